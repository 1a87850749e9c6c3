"""Learning about one block: what every learned transform does with its samples, whatever it learns.

The block with rounded weights and inputs runs on what the blocks before it make of the samples, and ``loop.py`` brings
down the error of its output. A part of the samples is held out and decides what is kept; if round to nearest is better
there, that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from quantkit.learn.functional import Tensors
from quantkit.learn.loop import BeginEpoch, Group, LoopOptions, Losses, mean_loss, split, train
from quantkit.transforms.interface import Lesson, Situation, Solution
from quantkit.tuning.losses import Objective, channel_units
from quantkit.tuning.samples import Samples


class BlockOptions(LoopOptions):
    """What every method that learns about a block lets its user choose."""

    target: Literal["float", "quantised"] = Field(
        "float", description="the block's output in the float model, or what the float block makes of the same input"
    )
    inputs: Literal["float", "quantised"] = Field(
        "quantised",
        description="what enters the block while it is learned: what the blocks before it make of the samples as they "
        "will be stored, or in the float model; then blocks do not depend on each other",
    )
    skip_first: bool = Field(True, description="leave the first token of every sample out of the loss")


class Hook(Protocol):
    """A forward pre-hook of linears: what is done to their input, rounding included."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], /) -> tuple[Tensor, ...]: ...

    def forget(self) -> None:
        """Drop what the last forward left."""


class Learned(Protocol):
    """What is learned about a block."""

    @property
    def inputs(self) -> Mapping[str, Hook]:
        """Linear -> what is done to its input; linears that read one tensor have one in common."""

    def groups(self) -> Sequence[Group]:
        """The parameters."""

    def tensors(self) -> Tensors:
        """What takes the place of the block's tensors, with gradients; sets what ``inputs`` do as well."""

    def plain_tensors(self) -> Tensors:
        """The weights rounded to nearest, nothing else changed; ``inputs`` round and do nothing else."""

    def solution(self, fact: Mapping[str, Any]) -> Solution:
        """What was learned; ``fact`` is a line of the run record to begin with."""


class BlockLearner:
    """One block and its samples."""

    def __init__(self, situation: Situation, options: BlockOptions, lesson: Lesson, learned: Learned) -> None:
        self._situation, self._options, self._module, self._learned = situation, options, lesson.module, learned
        self._samples = Samples(
            lesson.module,
            lesson.streams,
            lesson.targets,
            skip_first=int(options.skip_first),
            stream=options.inputs,
        )
        unit, variance = channel_units(self._samples.targets(self._samples.with_target()))
        self._objective = Objective("mse", 0.0, unit, variance)

    def run(
        self,
        choose_start: Callable[[Sequence[int]], None] | None = None,
        begin_epoch: BeginEpoch | None = None,
    ) -> Solution:
        """Train, and return what was learned, or nothing if round to nearest is no worse.

        Args:
            choose_start: called with the samples to learn from before the first step; may use ``loss``.
            begin_epoch: as for ``loop.train``.
        """
        options, situation, learned = self._options, self._situation, self._learned
        with self._changed_inputs():
            samples, before = self._usable()
            learn, judges = split(samples, options.holdout, situation.seed)
            if not judges or not any(before.values()):  # nothing to go by, or nothing that is lost
                return Solution()
            if choose_start:
                choose_start(learn)
            curve = train(learned.groups(), self._fix, learn, judges, options, situation.seed, begin_epoch)
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

    def loss(self, samples: Sequence[int]) -> float:
        """Mean loss of ``samples`` with what is learned as it is now."""
        return mean_loss(self._fix, samples, self._options.micro_batch)

    def _fix(self) -> Losses:
        return self._losses(self._learned.tensors())

    def _losses(self, tensors: Tensors) -> Losses:
        """Losses of the block with ``tensors`` in the place of its own."""

        def losses(samples: Sequence[int]) -> Tensor:
            found = []
            for part in self._samples.parts(samples):
                self._forget_inputs()
                outcome = self._samples.run(part, tensors)
                found.append(self._objective.of(outcome.output, outcome.target, outcome.mask))
            return torch.cat(found)

        return losses

    def _usable(self) -> tuple[list[int], dict[int, float]]:
        """Samples that have a finite loss when everything is rounded to nearest, and that loss."""
        found: dict[int, float] = {}
        with torch.no_grad():
            losses, samples = self._losses(self._learned.plain_tensors()), self._samples.with_target()
            for first in range(0, len(samples), self._options.micro_batch):
                part = samples[first : first + self._options.micro_batch]
                found.update(zip(part, losses(part).tolist(), strict=True))
        finite = {sample: loss for sample, loss in found.items() if math.isfinite(loss)}
        return list(finite), finite

    def _forget_inputs(self) -> None:
        for hook in self._learned.inputs.values():
            hook.forget()

    @contextmanager
    def _changed_inputs(self) -> Iterator[None]:
        """Inside, the block does to the inputs of linears what it will do at run time."""
        handles = [
            self._module.get_submodule(name).register_forward_pre_hook(hook)
            for name, hook in self._learned.inputs.items()
            if name in self._situation.linears
        ]
        try:
            yield
        finally:
            self._forget_inputs()
            for handle in handles:
                handle.remove()
