"""Norm Tweaking (Li et al., arXiv 2309.02784): train the norms of a block whose linears are rounded.

Nothing but the norms' weights and biases moves, a number or two per channel. As published, they are trained until the
mean and the variance of every channel of the block's output are what they were (``preset: faithful``). Differences:

  - Steps are shares of what a norm multiplies by (``norms.py``), so one learning rate suits norms into which scales of
    other methods were folded. Steps that add up to less than the stored dtype can hold would be lost.
  - With the statistics comes the mean squared error (``losses.py``): of two outputs distributed alike, the one nearer
    to the target is better. With ``target: float`` that is the block's output in the float model, not what the float
    block makes of the same input: what earlier blocks lost is made up for as well, which does harm if it was too much.
  - A part of the samples is held out. New values are taken only if there, as they will be stored, they bring the block
    closer in distribution and in mean squared error; else with half the steps, and at last not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from quantkit.tuning.closed_form import readers_of, solve_norm
from quantkit.tuning.interface import Situation, Tuned
from quantkit.tuning.losses import Loss, Objective, channel_units
from quantkit.tuning.norms import Delta, NormValues, find_norms
from quantkit.tuning.samples import Samples

_FAITHFUL: dict[str, Any] = {
    "mse_weight": 0.0, "normalise": False, "skip_first": False, "relative": False, "lr": 1e-5, "schedule": 5.0,
    "iterations": 1, "batch": 1, "holdout": 0.0,
}  # fmt: skip
"""What the authors do, as far as it differs from the defaults."""
_EPSILON = 1e-8
"""Adam's, for a loss that is a sum over channels; ours are means."""
_TOO_COARSE = 0.05
"""If the stored dtype keeps less than this share of the entries that were moved, it is worth a word."""
_LARGEST_SCALE = 2.0
"""The closed form changes what a norm multiplies by at most so much, up or down."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``norm-tweaking``."""

    preset: Literal["recommended", "faithful"] = Field(
        "recommended", description="faithful: the authors' recipe, for every option that is not given"
    )
    target: Literal["quantised", "float"] = Field(
        "quantised", description="what the float block makes of the same input, or its output in the float model"
    )
    loss: Loss = Field("dist_sq_std", description="what is minimised; dist: mean and spread of every channel")
    mse_weight: float = Field(1.0, ge=0, description="weight of the mean squared error beside the loss")
    normalise: bool = Field(True, description="measure every channel's mean and spread by its standard deviation")
    skip_first: bool = Field(True, description="leave the first token of every sample out of the loss")
    relative: bool = Field(True, description="steps are shares of what a norm multiplies by")
    lr: float = Field(2e-3, ge=0, description="Adam's learning rate in the first block")
    schedule: float = Field(1.0, ge=0, description="block l of L: lr * (1 + schedule * l / L)")
    iterations: int = Field(1, ge=0, description="passes over the samples")
    batch: int = Field(1, ge=1, description="samples per step")
    limit: float = Field(0.1, gt=0, le=1, description="largest relative change")
    holdout: float = Field(0.1, ge=0, le=0.5, description="share of the samples that judge the result; 0: taken as is")
    tries: int = Field(4, ge=1, description="with the learning rate halved each time, until the judgement is good")
    closed_form: Literal["none", "init", "only"] = Field(
        "none", description="first, or only, solve for the norms that feed linears"
    )
    ridge: float = Field(0.01, ge=0, description="closed form: pull towards no change")
    include_qk_norm: bool = Field(False, description="also norms of queries and keys")

    @model_validator(mode="before")
    @classmethod
    def _preset_first(cls, data: Any) -> Any:
        faithful = isinstance(data, Mapping) and data.get("preset") == "faithful"
        return {**_FAITHFUL, **data} if faithful else data

    @model_validator(mode="after")
    def _closed_form_is_relative(self) -> Config:
        if self.closed_form != "none" and not self.relative:
            raise ValueError("closed_form gives relative changes: set relative to true or closed_form to none")
        return self


def needs_reference(config: Config) -> bool:
    return config.closed_form != "none"


def tune(situation: Situation, config: Config) -> Tuned:
    """New values for the norms of a block, or none if they would not bring its output closer to the target."""
    # Not in inference mode, in which the pipeline runs: there are no gradients in it.
    with torch.inference_mode(False), torch.enable_grad():
        return _Tweaking(situation, config).run()


@dataclass(frozen=True)
class _Measure:
    """Means over samples."""

    distance: float
    mse: float

    def loss(self, mse_weight: float) -> float:
        """What is minimised."""
        return self.distance + mse_weight * self.mse

    def no_worse_than(self, other: _Measure) -> bool:
        return self.distance <= other.distance and self.mse <= other.mse  # False for NaN


class _Tweaking:
    """One block."""

    def __init__(self, situation: Situation, config: Config) -> None:
        self._situation = situation
        self._config = config
        self._samples = Samples(
            situation.module, situation.streams, situation.targets, skip_first=int(config.skip_first)
        )
        self._norms = NormValues(
            situation.module,
            find_norms(situation.module, include_qk=config.include_qk_norm),
            situation.stored_dtypes,
            offset=situation.norm_offset,
            relative=config.relative,
        )
        samples = self._samples.with_target()
        unit, variance = channel_units(self._samples.targets(samples))
        if not config.normalise:
            unit = torch.ones_like(unit)
        self._objective = Objective(config.loss, config.mse_weight, unit, variance)
        self._start = self._norms.zeros()
        self._before = self._measured(self._start, samples)
        self._train, self._heldout = self._split()
        self._skipped = 0

    def run(self) -> Tuned:
        config = self._config
        missing = None
        if not self._start:
            missing = "the block has no norm with a weight of its own; nothing is tuned."
        elif not self._train:
            missing = "no calibration sample is left to learn from; nothing is tuned."
        if missing:
            return Tuned(facts={"accepted": False}, warning=missing)
        kept, facts = self._start, dict[str, Any]()
        if config.closed_form != "none":
            kept = self._solved()
            facts["closed_form_accepted"] = kept is not self._start
        if config.closed_form != "only" and config.iterations and config.lr:
            kept, facts["lr"], facts["tries"] = self._descend(kept)
        return self._result(kept, facts)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _split(self) -> tuple[list[int], list[int]]:
        """The samples to learn from, and those that are held out to judge the result."""
        finite = [sample for sample, row in self._before.items() if bool(row.isfinite().all())]
        sound = torch.tensor(finite, dtype=torch.int64)
        order = sound[torch.randperm(len(sound), generator=torch.Generator().manual_seed(self._situation.seed))]
        count = max(1, round(len(sound) * self._config.holdout)) if self._config.holdout else 0
        return sorted(order[count:].tolist()), sorted(order[:count].tolist())

    def _measured(self, delta: Delta, samples: list[int]) -> dict[int, Tensor]:
        """Sample -> distance and mse [2], with the norms as they are stored."""
        values, found = self._norms.stored(delta), dict[int, Tensor]()
        with torch.no_grad():
            for part in self._samples.parts(samples):
                outcome = self._samples.run(part, values)
                rows = self._objective.measure(outcome.output, outcome.target, outcome.mask)
                found.update(zip(part.samples, rows, strict=True))
        return found

    def _mean(self, delta: Delta, samples: list[int]) -> _Measure:
        """Over ``samples``; of none of them: 0."""
        measured = self._before if delta is self._start else self._measured(delta, samples)
        rows = torch.stack([measured[sample] for sample in samples]) if samples else torch.zeros(1, 2)
        distance, mse = rows.double().mean(dim=0).tolist()
        return _Measure(distance, mse)

    # --- changing ----------------------------------------------------------------------------------------------------

    def _solved(self) -> Delta:
        """The closed form for every norm that feeds linears, or the start if that is better."""
        situation, config, norms = self._situation, self._config, self._norms
        assert situation.reference is not None
        delta = dict(self._start)
        for site in situation.sites:
            if site.kind != "norm" or f"{site.producer}.weight" not in delta:
                continue
            readers = readers_of(
                site, situation.module, situation.reference, situation.streams, from_float=config.target == "float"
            )
            if readers:
                scale, shift = solve_norm(readers, config.ridge, shift=f"{site.producer}.bias" in delta)
                delta |= norms.delta_for(site.producer, scale.clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE), shift)
        judges = self._heldout or self._train
        better = self._mean(delta, judges).no_worse_than(self._mean(self._start, judges))
        return delta if better else self._start

    def _descend(self, start: Delta) -> tuple[Delta, float, int]:
        """What training makes of ``start`` (or ``start`` where that is better), the learning rate, how many tries."""
        config, situation = self._config, self._situation
        lr = config.lr * (1 + config.schedule * situation.index / situation.blocks)
        before = self._mean(start, self._heldout)
        for number in range(1, config.tries + 1):
            delta = self._trained(start, lr)
            if self._mean(delta, self._heldout).no_worse_than(before):  # always, if none is held out
                return delta, lr, number
            lr /= 2
        return start, lr, config.tries

    def _trained(self, start: Delta, lr: float) -> Delta:
        config = self._config
        delta = {name: d.clone().requires_grad_() for name, d in start.items()}
        optimiser = torch.optim.Adam(delta.values(), lr=lr, eps=_EPSILON / len(self._objective.unit))
        for _ in range(config.iterations):
            for first in range(0, len(self._train), config.batch):
                self._step(delta, optimiser, self._train[first : first + config.batch])
        return {name: d.detach() for name, d in delta.items()}

    def _step(self, delta: Delta, optimiser: torch.optim.Optimizer, samples: list[int]) -> None:
        """One step on the mean loss of ``samples``; none if there is no finite gradient."""
        optimiser.zero_grad()
        for part in self._samples.parts(samples):
            outcome = self._samples.run(part, self._norms.at(delta))
            losses = self._objective.of(outcome.output, outcome.target, outcome.mask)
            (losses.sum() / len(samples)).backward()
        if not all(d.grad is not None and bool(torch.isfinite(d.grad).all()) for d in delta.values()):
            self._skipped += 1
            return
        optimiser.step()
        if self._config.relative:
            with torch.no_grad():
                for d in delta.values():
                    d.clamp_(-self._config.limit, self._config.limit)

    # --- telling -----------------------------------------------------------------------------------------------------

    def _result(self, kept: Delta, facts: dict[str, Any]) -> Tuned:
        norms = self._norms
        tensors = norms.changed(kept)
        changed, moved = norms.changed_share(kept), any(bool(d.any()) for d in kept.values())
        judges = self._heldout or self._train
        facts |= {
            "loss_before": self._mean(self._start, judges).loss(self._config.mse_weight),
            "loss": self._mean(kept, judges).loss(self._config.mse_weight),
            "accepted": kept is not self._start,
            "skipped_steps": self._skipped,
            "max_delta": max(float(d.abs().max()) for d in kept.values()),
            "changed": changed,
            "before": self._losses(self._start),
            "after": self._losses(kept),
        }
        warning = None
        if moved and changed < _TOO_COARSE:
            warning = (
                f"the dtype that norms are stored in holds {changed:.0%} of their new values apart from the old ones; "
                "give a larger lr, or keep them in float32 (--dtype float32)."
            )
        return Tuned(tensors, facts, warning)

    def _losses(self, delta: Delta) -> dict[str, dict[str, float]]:
        groups = {"train": self._train, "heldout": self._heldout}
        return {name: vars(self._mean(delta, samples)) for name, samples in groups.items() if samples}
