"""FlatQuant (Sun et al., arXiv 2410.09426): learn matrices that make weights and inputs flat, block by block.

    y = W @ x   becomes   y = ((W / c) @ P**-1) @ (P @ (x * c))        P.T = left (x) right        c: [in_features], > 0

P (eq. 2, 3) is applied at run time, as two small matrices to either side of an input that is read as a matrix; c is
folded into what makes the signal. Values are multiplied by a matrix per key/value head that is folded into v and o;
of the input of o only the heads are mixed at run time, so that its ``right`` is the identity. Weights and inputs are
limited to learned shares of their ranges, behind all of that. Where keys and values are quantised, so are they, and
keys are multiplied by a learned matrix on their way into the cache (``learn/keys.py``). Everything is trained by the
error of the block's output with all that is rounded, against that of the float block (eq. 4). Differences from the
authors' code:

  - c and P start where the errors of inputs and weights are least together (``learn/balance.py``), but for a Hadamard
    matrix behind that, limits where a search has them; steps are taken with Nesterov's momentum: far fewer will do.
  - c and the stretch of P are learned as logarithms, so nothing crosses 0; there is no weight decay.
  - One limit for all linears that read an input, so that it is transformed and rounded once; a matrix of their own for
    the values of every key/value head; limits of the weights of v behind it.
  - Mixtures have one matrix for all experts of a block, c for each. Inputs that nothing scales (second linears behind
    GELU, post-norm blocks) are scaled at run time.
  - A part of the samples is held out and decides what is kept; if rounding to nearest is better there, that is.

What enters a block while it is learned is what does in the float model, so blocks do not depend on each other. Only
round to nearest asks for limits of weights, only dynamic activations for those of inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from quantkit.learn.block import BlockLearner, BlockOptions
from quantkit.learn.flat import FlatBlock
from quantkit.learn.loop import Share
from quantkit.learn.matrices import Parameterisation, Start
from quantkit.learn.places import places
from quantkit.models.block import Site
from quantkit.transforms.interface import InputOp, Online, Situation, Solution

_START_SAMPLES = 8
"""Samples that decide where limits start."""
_FAITHFUL = {
    "epochs": 15, "batch": 4, "micro_batch": 4, "holdout": 0.0, "skip_first": False, "warmup": 0.0,
    "optimiser": "adam", "betas": (0.9, 0.999), "schedule": "cosine",
    "matrix_start": "cayley", "diag_start": "smoothquant", "alpha": 0.3, "clip_start": "wide", "lr": 5e-3,
    "lr_clip": 5e-2, "patience": 1000,  # no early end
}  # fmt: skip


class Config(BlockOptions):
    """Options of ``flatquant``."""

    preset: Literal["recommended", "faithful"] = Field(
        "recommended", description="faithful: the authors' recipe, for every option that is not given"
    )
    epochs: int = Field(3, ge=0, description="passes over the samples")
    batch: int = Field(2, ge=1, description="samples per step")
    micro_batch: int = Field(2, ge=1, description="samples at a time: less memory, the same steps")
    optimiser: Literal["adam", "nadam"] = Field("nadam", description="nadam: Adam with Nesterov's momentum")
    betas: tuple[Share, Share] = Field((0.8, 0.99), description="decay of the means of gradients and of their squares")
    inputs: Literal["float", "quantised"] = Field(
        "float", description="what enters the block while it is learned; float: blocks do not depend on each other"
    )
    schedule: Literal["constant", "cosine", "linear"] = Field("linear", description="of the learning rates, down to 0")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rates rise from 0")
    matrices: bool = Field(True, description="learn matrices that mix the channels of inputs, and of values in heads")
    diagonal: bool = Field(True, description="learn scales of channels in front of them")
    weight_clip: bool = Field(True, description="learn limits for the weights; only before rtn")
    activation_clip: bool = Field(True, description="learn limits for the inputs; only dynamic activations")
    keys: bool = Field(
        True, description="learn matrices for keys that would be rotated, and limits of keys and values; only with KV"
    )
    parameterisation: Parameterisation = Field("svd", description="of the matrices: themselves, or as U S V")
    matrix_start: Start = Field(
        "balanced",
        description="matrices to start with: Hadamard behind the stretch with the least errors of inputs and weights, "
        "Hadamard, uniformly random, or the authors' half mixed ones",
    )
    diag_start: Literal["rms", "smoothquant", "one"] = Field(
        "rms", description="scales to start with: sqrt(rms of weights / rms of inputs), SmoothQuant's with ``alpha``, 1"
    )
    alpha: float = Field(0.3, ge=0, le=1, description="exponent of diag_start: smoothquant")
    clip_start: Literal["search", "wide"] = Field(
        "search", description="limits to start with: searched where that helps, or the authors' 0.982 of the range"
    )
    lr: float = Field(2.5e-2, gt=0, description="learning rate of matrices and scales")
    lr_clip: float = Field(5e-2, gt=0, description="learning rate of limits")

    @model_validator(mode="before")
    @classmethod
    def _preset_first(cls, data: Any) -> Any:
        faithful = isinstance(data, Mapping) and data.get("preset") == "faithful"
        return {**_FAITHFUL, **data} if faithful else data


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    found: Online = {}
    for place in places(sites, linears):
        ops: set[InputOp] = {"kronecker"} if config.matrices else set()
        if config.diagonal and place.sites[0].kind == "none":
            ops.add("scale")
        if config.activation_clip:
            ops.add("clip")
        found |= dict.fromkeys(place.linears, frozenset(ops))
    return found


def solve(situation: Situation, config: Config) -> Solution:
    """Matrices, scales and limits of a block and its cache, or nothing if round to nearest is no worse."""
    observed = situation.observed
    assert observed is not None
    assert observed.lesson is not None
    # Not in inference mode, in which the pipeline runs: there are no gradients in it.
    with torch.inference_mode(False), torch.enable_grad():
        lesson = observed.lesson((config.target,))
        with lesson.targets:
            learned = FlatBlock(situation, config, observed, lesson)
            if not any(group.parameters for group in learned.groups()):
                situation.note(
                    "flatquant has nothing to learn in some blocks: see its options matrices, diagonal, weight_clip, "
                    "activation_clip and keys."
                )
                return Solution()
            learner = BlockLearner(situation, config, lesson, learned)
            try:
                if config.clip_start == "wide":
                    return learner.run()
                return learner.run(lambda samples: _choose_limits(learner, learned, samples[:_START_SAMPLES]))
            finally:
                learned.leave()


def _choose_limits(learner: BlockLearner, learned: FlatBlock, samples: Sequence[int]) -> None:
    """Start with the searched limits of all weights, then of all inputs, then of keys and values, or half of them, if
    that is better."""
    least = learner.loss(samples)
    for kind in learned.kinds:
        best = 0.0
        for share in (0.5, 1.0):
            learned.start_limits(kind, share)
            loss = learner.loss(samples)
            if loss < least:
                least, best = loss, share
        learned.start_limits(kind, best)
