"""One optimiser loop for everything that is learned about a block.

Adam in float32, with Nesterov's momentum if wanted (Dozat, NAdam, ICLR workshop 2016), on a few groups of parameters,
each with its learning rate. A part of the samples is held out; what is
kept is the state with the least loss there, the one before the first step included. A step without finite gradients is
not taken. An epoch that ends without a finite loss, or in which most steps could not be taken, is undone: training goes
on from the best state with half the learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

Losses = Callable[[Sequence[int]], Tensor]
"""Samples -> the loss of each, [samples]."""
BeginEpoch = Callable[[int, int], bool]
"""(epoch 0 .. epochs - 1, epochs), before its first step -> does everything learn from here on?"""

Share = Annotated[float, Field(ge=0, lt=1)]
_HALVINGS = 3
"""As often are the learning rates halved before training is given up."""


class LoopOptions(BaseModel, frozen=True, extra="forbid"):
    """What every learned method lets its user choose."""

    epochs: int = Field(10, ge=0, description="passes over the samples")
    batch: int = Field(4, ge=1, description="samples per step")
    micro_batch: int = Field(4, ge=1, description="samples at a time: less memory, the same steps")
    optimiser: Literal["adam", "nadam"] = Field("adam", description="nadam: Adam with Nesterov's momentum")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay of the means of gradients and of their squares")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="of the learning rates, down to 0")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the learning rates rise from 0")
    holdout: float = Field(0.1, ge=0, le=0.5, description="share of the samples that judge the result; 0: all judge")
    patience: int = Field(
        3, ge=1, description="epochs without a better result before training stops, once everything learns"
    )
    autocast: bool = Field(False, description="matrix products in bfloat16 while training; judged in float32")


@dataclass(frozen=True)
class Group:
    """Parameters that are trained with one learning rate."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float


@dataclass
class Curve:
    """How training went."""

    train: list[float] = field(default_factory=list)
    """Per epoch, the mean loss of its steps as they were taken."""
    holdout: list[float] = field(default_factory=list)
    """Before the first step, then behind every epoch."""
    best_epoch: int = 0
    """Whose state was kept; 0: the one before the first step."""
    steps: int = 0
    """Taken."""
    skipped_steps: int = 0
    """Not taken, for lack of finite gradients."""
    halvings: int = 0
    """Of the learning rates."""

    @property
    def before(self) -> float:
        return self.holdout[0]

    @property
    def best(self) -> float:
        return self.holdout[self.best_epoch]

    def record(self) -> dict[str, Any]:
        """JSON-ready; None stands for a loss that is not finite."""
        curves = {"train": self.train, "holdout": self.holdout}
        finite = {name: [x if math.isfinite(x) else None for x in values] for name, values in curves.items()}
        rest = {name: value for name, value in vars(self).items() if name not in curves}
        return {**rest, **finite}


def split(samples: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(to learn from, to judge by), each in order. Of few samples at least one is held out, and one is left to learn
    from; where that cannot be, or nothing is to be held out, the judges are those learned from."""
    count = min(max(1, round(len(samples) * share)), len(samples) - 1) if share else 0
    if count <= 0:
        return list(samples), list(samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [s for n, s in enumerate(samples) if n not in held], [s for n, s in enumerate(samples) if n in held]


def mean_loss(fix: Callable[[], Losses], samples: Sequence[int], micro_batch: int) -> float:
    """Mean over ``samples``, without gradients; arguments as for ``train``."""
    with torch.no_grad():
        losses, total = fix(), 0.0
        for first in range(0, len(samples), micro_batch):
            total += float(losses(samples[first : first + micro_batch]).sum(dtype=torch.float64))
    return total / len(samples)


def train(
    groups: Sequence[Group],
    fix: Callable[[], Losses],
    learn: Sequence[int],
    judges: Sequence[int],
    options: LoopOptions,
    seed: int,
    begin_epoch: BeginEpoch | None = None,
) -> Curve:
    """Change the parameters, in place, to the best state that is found.

    Args:
        groups: a group without parameters is none.
        fix: computes what depends on the parameters alone and returns the losses of samples, with gradients. Called
            for every micro-batch, and once to judge.
        learn: samples to learn from, neighbours best next to each other.
        judges: samples that decide which state is kept.
        seed: of the order of the steps.
        begin_epoch: told of every epoch: for what is let in on the learning step by step. What a parameter does may
            only change where it still has its first value: a state that was kept is judged by what it did then.
    """
    # Inference mode, in which the pipeline runs, knows no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        return _Training(groups, fix, learn, judges, options, seed, begin_epoch).run()


class _Training:
    """State of one call of ``train``."""

    def __init__(
        self,
        groups: Sequence[Group],
        fix: Callable[[], Losses],
        learn: Sequence[int],
        judges: Sequence[int],
        options: LoopOptions,
        seed: int,
        begin_epoch: BeginEpoch | None,
    ) -> None:
        self._groups = [group for group in groups if group.parameters]
        self._parameters = [parameter for group in self._groups for parameter in group.parameters]
        self._fix = fix
        self._judges = judges
        self._options = options
        self._begin_epoch = begin_epoch
        self._batches = [learn[first : first + options.batch] for first in range(0, len(learn), options.batch)]
        self._generator = torch.Generator().manual_seed(seed)
        self._shrink = 1.0
        self._best: list[Tensor] = []

    def run(self) -> Curve:
        curve = Curve(holdout=[self._judge()])
        self._keep()
        # A loss of 0 has no gradient but that of rounding.
        if self._parameters and self._batches and curve.before != 0:
            self._descend(curve)
            self._restore()
        return curve

    def _descend(self, curve: Curve) -> None:
        optimiser, least, stale = self._new_optimiser(), curve.before, 0
        for epoch in range(1, self._options.epochs + 1):
            skipped = curve.skipped_steps
            settled = self._begin_epoch is None or self._begin_epoch(epoch - 1, self._options.epochs)
            self._epoch(optimiser, epoch, curve)
            held = self._judge()
            curve.holdout.append(held)
            if not math.isfinite(held) or 2 * (curve.skipped_steps - skipped) > len(self._batches):
                if curve.halvings == _HALVINGS:
                    return
                curve.halvings += 1
                self._shrink /= 2
                self._restore()
                optimiser = self._new_optimiser()  # moments of what went wrong would do it again
            elif held < least or not math.isfinite(least):
                least, stale, curve.best_epoch = held, 0, epoch
                self._keep()
            elif settled:
                stale += 1
                if stale == self._options.patience:
                    return

    def _epoch(self, optimiser: torch.optim.Optimizer, epoch: int, curve: Curve) -> None:
        order = torch.randperm(len(self._batches), generator=self._generator).tolist()
        losses = []
        for number, index in enumerate(order):
            factor = self._shrink * self._factor((epoch - 1) * len(order) + number)
            for settings, group in zip(optimiser.param_groups, self._groups, strict=True):
                settings["lr"] = group.lr * factor
            loss = self._step(optimiser, self._batches[index])
            if loss is None:
                curve.skipped_steps += 1
            else:
                curve.steps += 1
                losses.append(loss)
        curve.train.append(sum(losses) / len(losses) if losses else math.nan)

    def _step(self, optimiser: torch.optim.Optimizer, samples: Sequence[int]) -> float | None:
        """The mean loss of ``samples``; None: there are no finite gradients, nothing was changed."""
        optimiser.zero_grad(set_to_none=True)
        device, total = self._parameters[0].device.type, 0.0
        for first in range(0, len(samples), self._options.micro_batch):
            with torch.autocast(device, torch.bfloat16, enabled=self._options.autocast):
                loss = self._fix()(samples[first : first + self._options.micro_batch]).sum() / len(samples)
            if not torch.isfinite(loss):
                return None
            loss.backward()
            total += float(loss.detach())
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            return None
        optimiser.step()
        return total

    def _factor(self, step: int) -> float:
        """What the learning rates are multiplied by in step 0, 1, ..."""
        steps = self._options.epochs * len(self._batches)
        warm = self._options.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        gone = (step - warm) / (steps - warm)
        return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * gone)), "linear": 1 - gone}[
            self._options.schedule
        ]

    def _new_optimiser(self) -> torch.optim.Optimizer:
        made = torch.optim.NAdam if self._options.optimiser == "nadam" else torch.optim.Adam
        groups = [{"params": list(group.parameters), "lr": group.lr} for group in self._groups]
        return made(groups, betas=self._options.betas)

    def _judge(self) -> float:
        return mean_loss(self._fix, self._judges, self._options.micro_batch)

    def _keep(self) -> None:
        self._best = [parameter.detach().clone() for parameter in self._parameters]

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)
