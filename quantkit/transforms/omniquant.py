"""OmniQuant (Shao et al., arXiv 2308.13137): learn limits of weights and changes of signals, block by block.

    y = W @ x + b   becomes   y = (W / t) @ ((x - z) * t) + (b + W @ z)        t, z: [signal width], t > 0

t and z (learnable equivalent transformation, eq. 3) are folded into what makes the signal. Every group of weights is
limited to shares of its range before it is rounded (learnable weight clipping, eq. 2; ``learn/fake_quant.py``). Both
are trained by the error of the output of the block with rounded weights and inputs, on what the quantised blocks before
it make of the samples, against the block's output in the float model. Differences from the authors' code:

  - t is learned as its logarithm, z in units of the signal's range, so neither can cross 0 or depends on units.
  - Limits start where a search over the weights puts them, or half the way there, if that lowers the block's error
    (for one linear after the other, at 2 bits it may not), else at the authors' 0.982 of the range.
  - Also the input of a down projection is changed where what makes it is linear in it, and with grouped heads the
    values, one t for all query heads that read one. Queries and keys share a factor per rotated pair of channels: one
    for each channel, as the authors have it, does not commute with rotary embeddings.
  - A part of the samples is held out and decides what is kept; if rounding to nearest is better there, that is.

Only round to nearest asks for limits: other roundings choose their range themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from quantkit.learn.block import BlockLearner, BlockOptions
from quantkit.learn.changes import BlockChanges
from quantkit.models.block import Site
from quantkit.transforms.interface import InputOp, Lesson, Observed, Online, Situation, Solution, online_sites

if TYPE_CHECKING:
    from quantkit.calibrate.streams import StreamName

_START_SAMPLES = 8
"""Samples that decide where limits start."""


class Config(BlockOptions):
    """Options of ``omniquant``."""

    clip: bool = Field(True, description="learn limits for the weights; only before rtn")
    clip_start: Literal["search", "wide"] = Field(
        "search", description="limits to start with: searched where that helps, or the authors' 0.982 of the range"
    )
    let: Literal["auto", "always", "never"] = Field(
        "auto", description="learn scales and shifts of signals; auto: where inputs are rounded, too"
    )
    shift: Literal["auto", "never"] = Field("auto", description="auto: wherever there are biases that can hold it")
    query_key: bool = Field(
        False, description="scale queries against keys, by powers of two; of use only if those are rounded"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="scales to start with: SmoothQuant's with this exponent")
    lr_let: float = Field(5e-3, gt=0, description="learning rate of scales and shifts")
    lr_clip: float = Field(
        5e-2, gt=0, description="learning rate of limits; the authors' is 0.01 for ten times as many steps"
    )
    aug_loss: bool = Field(False, description="target float: both targets; the authors' choice for 2 bits")

    def changes_signals(self, rounds_inputs: bool) -> bool:
        return self.let == "always" or (self.let == "auto" and rounds_inputs)


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    if config.let == "never":
        return {}
    ops: set[InputOp] = {"scale", "shift"} if config.shift == "auto" else {"scale"}
    return online_sites(sites, linears, ops)


def solve(situation: Situation, config: Config) -> Solution:
    """Changes of the signals of a block and limits of its linears, or nothing if round to nearest is no worse."""
    return learn("omniquant", situation, config, lambda *seen: BlockChanges(situation, config, *seen))


def learn(
    method: str, situation: Situation, config: Config, changes: Callable[[Observed, Lesson], BlockChanges]
) -> Solution:
    """What ``changes`` become by training, or nothing if round to nearest is no worse.

    Args:
        method: whose options ``config`` are.
        changes: makes what is learned, where it starts.
    """
    observed = situation.observed
    assert observed is not None
    assert observed.lesson is not None
    both = config.target == "float" and config.aug_loss  # two squares have the slope of one, to the mean
    streams: tuple[StreamName, ...] = ("float", "quantised") if both else (config.target,)
    # Not in inference mode, in which the pipeline runs: there are no gradients in it.
    with torch.inference_mode(False), torch.enable_grad():
        lesson = observed.lesson(streams)
        with lesson.targets:
            learned = changes(observed, lesson)
            if not any(group.parameters for group in learned.groups()):
                situation.note(f"{method} has nothing to learn in some blocks: see its options clip and let.")
                return Solution()
            learner = BlockLearner(situation, config, lesson, learned)
            if config.clip_start == "wide":
                return learner.run(None, learned.begin_epoch)
            choose = partial(_choose_limits, learner, learned)
            return learner.run(choose, learned.begin_epoch)


def _choose_limits(learner: BlockLearner, learned: BlockChanges, samples: Sequence[int]) -> None:
    """Start with the searched limits of a linear (of all experts at once), or half of them, if that is better."""
    samples = samples[:_START_SAMPLES]
    least = learner.loss(samples)
    for names in learned.kinds():
        best = 0.0
        for share in (0.5, 1.0):
            learned.start_limits(names, share)
            loss = learner.loss(samples)
            if loss < least:
                least, best = loss, share
        learned.start_limits(names, best)
