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

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.learn.changes import BlockChanges
from quantkit.learn.functional import Tensors
from quantkit.learn.loop import Group, LoopOptions, Losses, mean_loss, split, train
from quantkit.models.block import Site
from quantkit.transforms.interface import InputOp, Lesson, Observed, Online, Situation, Solution, online_sites
from quantkit.tuning.losses import Objective, channel_units
from quantkit.tuning.samples import Samples

if TYPE_CHECKING:
    from quantkit.calibrate.streams import StreamName

_START_SAMPLES = 8
"""Samples that decide where limits start."""


class Config(LoopOptions):
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
    target: Literal["float", "quantised"] = Field(
        "float", description="the block's output in the float model, or what the float block makes of the same input"
    )
    aug_loss: bool = Field(False, description="target float: both targets; the authors' choice for 2 bits")
    skip_first: bool = Field(True, description="leave the first token of every sample out of the loss")

    def changes_signals(self, rounds_inputs: bool) -> bool:
        return self.let == "always" or (self.let == "auto" and rounds_inputs)


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    if config.let == "never":
        return {}
    ops: set[InputOp] = {"scale", "shift"} if config.shift == "auto" else {"scale"}
    return online_sites(sites, linears, ops)


def solve(situation: Situation, config: Config) -> Solution:
    """Changes of the signals of a block and limits of its linears, or nothing if round to nearest is no worse."""
    observed = situation.observed
    assert observed is not None
    assert observed.lesson is not None
    both = config.target == "float" and config.aug_loss  # two squares have the slope of one, to the mean
    streams: tuple[StreamName, ...] = ("float", "quantised") if both else (config.target,)
    # Not in inference mode, in which the pipeline runs: there are no gradients in it.
    with torch.inference_mode(False), torch.enable_grad():
        lesson = observed.lesson(streams)
        with lesson.targets:
            return _OmniQuant(situation, config, observed, lesson).run()


class _OmniQuant:
    """One block."""

    def __init__(self, situation: Situation, config: Config, observed: Observed, lesson: Lesson) -> None:
        self._situation, self._config, self._module = situation, config, lesson.module
        self._samples = Samples(lesson.module, lesson.streams, lesson.targets, skip_first=int(config.skip_first))
        base = {name: tensor.detach() for name, tensor in lesson.module.named_parameters()}
        self._learned = BlockChanges(situation, config, observed, base, self._touched())
        unit, variance = channel_units(self._samples.targets(self._samples.with_target()))
        self._objective = Objective("mse", 0.0, unit, variance)

    def run(self) -> Solution:
        config, situation, learned = self._config, self._situation, self._learned
        groups = [Group("let", learned.of_signals(), config.lr_let), Group("clip", learned.of_limits(), config.lr_clip)]
        if not any(group.parameters for group in groups):
            situation.note("omniquant has nothing to learn in some blocks: see its options clip and let.")
            return Solution()
        with self._rounded_inputs():
            samples, before = self._usable()
            learn, judges = split(samples, config.holdout, situation.seed)
            if not judges or not any(before.values()):  # nothing to go by, or nothing that is lost
                return Solution()
            if config.clip_start == "search":
                self._choose_limits(learn[:_START_SAMPLES])
            curve = train(groups, self._fix, learn, judges, config, situation.seed)
        plain = sum(before[sample] for sample in judges) / len(judges)
        accepted = curve.best < plain
        fact = {
            "loss_before": plain,
            "loss": curve.best if accepted else plain,
            "accepted": accepted,
            "learned_from": len(learn),
            "judged_by": len(judges),
            "learning": curve.record(),
        }
        return learned.solution(fact) if accepted else Solution(facts=[fact])

    def _choose_limits(self, samples: Sequence[int]) -> None:
        """Start with the searched limits of a linear (of all experts at once), or half of them, if that is better."""
        least = mean_loss(self._fix, samples, self._config.micro_batch)
        for names in self._learned.kinds():
            best = 0.0
            for share in (0.5, 1.0):
                self._learned.start_limits(names, share)
                loss = mean_loss(self._fix, samples, self._config.micro_batch)
                if loss < least:
                    least, best = loss, share
            self._learned.start_limits(names, best)

    def _touched(self) -> set[str]:
        """Linears whose input an earlier transform changes at run time."""
        return {name for name in self._situation.linears if self._module.get_submodule(name)._forward_pre_hooks}

    def _fix(self) -> Losses:
        return self._losses(self._learned.tensors())

    def _losses(self, tensors: Tensors) -> Losses:
        """Losses of the block with ``tensors`` in the place of its own."""

        def losses(samples: Sequence[int]) -> Tensor:
            found = []
            for part in self._samples.parts(samples):
                self._learned.forget_inputs()
                outcome = self._samples.run(part, tensors)
                found.append(self._objective.of(outcome.output, outcome.target, outcome.mask))
            return torch.cat(found)

        return losses

    def _usable(self) -> tuple[list[int], dict[int, float]]:
        """Samples that have a finite loss when everything is rounded to nearest, and that loss."""
        found: dict[int, float] = {}
        with torch.no_grad():
            losses, samples = self._losses(self._learned.plain_tensors()), self._samples.with_target()
            for first in range(0, len(samples), self._config.micro_batch):
                part = samples[first : first + self._config.micro_batch]
                found.update(zip(part, losses(part).tolist(), strict=True))
        finite = {sample: loss for sample, loss in found.items() if math.isfinite(loss)}
        return list(finite), finite

    @contextmanager
    def _rounded_inputs(self) -> Iterator[None]:
        """Inside, the block changes and rounds the inputs of linears as it will at run time."""
        hooks = self._learned.inputs
        handles = [
            self._module.get_submodule(name).register_forward_pre_hook(hook)
            for name, hook in hooks.items()
            if name in self._situation.linears
        ]
        try:
            yield
        finally:
            self._learned.forget_inputs()
            for handle in handles:
                handle.remove()
