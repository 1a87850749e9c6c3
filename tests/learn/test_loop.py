"""The loop keeps the best state it saw, survives steps that cannot be taken, and does the same thing twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.learn.loop import Curve, Group, LoopOptions, Losses, mean_loss, split, train

QUIET: dict[str, Any] = {"schedule": "constant", "holdout": 0.0, "batch": 8, "micro_batch": 8}


class Line:
    """y = w . x for samples x, whose targets another w made; ``spoil`` may change a loss of training."""

    def __init__(self, spoil: Callable[[int, Tensor], Tensor] = lambda step, loss: loss) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 5, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]) + 0.1 * torch.randn(40, generator=generator)
        self.w = nn.Parameter(torch.zeros(5))
        self.spoil = spoil
        self.calls = 0

    def fix(self) -> Losses:
        w = self.w * 1  # something that is computed from the parameters once

        def losses(samples: Sequence[int]) -> Tensor:
            rows = list(samples)
            found = (self.x[rows] @ w - self.y[rows]).square()
            if not torch.is_grad_enabled():
                return found
            self.calls += 1
            return self.spoil(self.calls, found)

        return losses

    def train(self, lr: float = 0.1, **options: Any) -> Curve:
        settings = LoopOptions(**(QUIET | options))
        return train([Group("w", [self.w], lr)], self.fix, range(32), range(32, 40), settings, seed=0)


def test_it_learns_and_keeps_the_best_epoch() -> None:
    line = Line()
    curve = line.train(epochs=60, patience=60)
    assert curve.best < 0.02 * curve.before
    assert curve.best == min(curve.holdout) == curve.holdout[curve.best_epoch]
    assert mean_loss(line.fix, range(32, 40), 3) == pytest.approx(curve.best, rel=1e-5)
    assert curve.steps == 60 * 4
    assert len(curve.holdout) == len(curve.train) + 1 == 61


def test_it_never_ends_worse_than_it_began() -> None:
    line = Line()
    curve = line.train(lr=100.0, epochs=5)
    assert min(curve.holdout[1:]) > curve.before
    assert curve.best_epoch == 0
    assert not line.w.any()


def test_it_stops_once_nothing_gets_better() -> None:
    assert len(Line().train(lr=100.0, epochs=50, patience=2).train) == 2


def test_patience_counts_once_everything_learns() -> None:
    """The parameter that matters is let in on the learning in the third epoch."""
    line, told = Line(), []

    def fix() -> Losses:
        rows = line.w if len(told) > 2 else 0 * line.w
        return lambda samples: (line.x[list(samples)] @ rows - line.y[list(samples)]).square()

    def begin_epoch(epoch: int, epochs: int) -> bool:
        told.append((epoch, epochs))
        return epoch >= 2

    settings = LoopOptions(**(QUIET | {"epochs": 9, "patience": 1}))
    curve = train([Group("w", [line.w], 0.1)], fix, range(32), range(32, 40), settings, 0, begin_epoch)
    assert told == [(epoch, 9) for epoch in range(9)]
    assert curve.holdout[0] == curve.holdout[1] == curve.holdout[2]  # two epochs without a better result
    assert curve.best_epoch == 9
    told.clear()
    stuck = train([Group("w", [line.w], 1e3)], fix, range(32), range(32, 40), settings, 0, begin_epoch)
    assert stuck.best_epoch == 0
    assert len(told) == 3


def test_the_same_seed_does_the_same() -> None:
    results = []
    for seed in (0, 0, 1):
        line = Line()
        train([Group("w", [line.w], 0.1)], line.fix, range(32), range(32, 40), LoopOptions(**QUIET, epochs=3), seed)
        results.append(line.w.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])  # another order of the steps


def test_micro_batches_take_the_same_steps() -> None:
    results = []
    for size in (1, 3, 4):
        line = Line()
        line.train(epochs=4, batch=4, micro_batch=size)
        results.append(line.w.detach())
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_is_not_taken(bad: float) -> None:
    line = Line(lambda step, loss: loss * bad if step in (2, 7) else loss)
    curve = line.train(epochs=10, patience=10)
    assert curve.skipped_steps == 2
    assert curve.steps == 38
    assert curve.halvings == 0
    assert curve.best < curve.before
    assert line.w.isfinite().all()


def test_a_step_without_finite_gradients_is_not_taken() -> None:
    """sqrt(0) has a finite value and no finite slope."""
    line = Line(lambda step, loss: loss + (0 * line.w).square().sum().sqrt() if step == 3 else loss)
    curve = line.train(epochs=2)
    assert (curve.skipped_steps, curve.steps) == (1, 7)
    assert line.w.isfinite().all()


def test_an_epoch_of_bad_steps_is_undone_with_half_the_rate() -> None:
    line = Line(lambda step, loss: loss * math.nan if 4 < step <= 8 else loss)
    curve = line.train(epochs=6, patience=6)
    assert curve.halvings == 1
    assert curve.skipped_steps == 4
    assert math.isnan(curve.train[1])
    assert curve.holdout[2] == curve.holdout[1]  # nothing was changed
    assert curve.best < curve.holdout[1]
    assert json.loads(json.dumps(curve.record(), allow_nan=False))["train"][1] is None


def test_it_gives_up_where_no_step_can_be_taken() -> None:
    line = Line(lambda step, loss: loss * math.nan)
    curve = line.train(epochs=50)
    assert (curve.halvings, curve.steps, curve.best_epoch) == (3, 0, 0)
    assert not line.w.any()
    assert len(curve.train) == 4


def test_nothing_to_gain_takes_no_step() -> None:
    line = Line()
    line.y = torch.zeros(40)
    assert line.train(epochs=5).record() == Curve(holdout=[0.0]).record()


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, [1.0] * 8),
        ({"warmup": 0.5}, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]),
        (
            {"schedule": "cosine", "warmup": 0.25},
            [1 / 3, 2 / 3, *((1 + math.cos(math.pi * n / 6)) / 2 for n in range(6))],
        ),
        ({"schedule": "linear", "warmup": 0.25}, [1 / 3, 2 / 3, *(1 - n / 6 for n in range(6))]),
    ],
    ids=["constant", "warm-up", "cosine", "both", "linear"],
)
def test_learning_rates_follow_the_schedule(options: dict[str, Any], factors: list[float]) -> None:
    """Where the slope is 1 everywhere, Adam's steps are the learning rate."""
    slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def fix() -> Losses:
        return lambda samples: (slow + fast).expand(len(samples)) + 1

    groups = [Group("slow", [slow], 0.01), Group("fast", [fast], 0.1), Group("none", [], 1.0)]
    train(groups, fix, range(8), range(8), LoopOptions(**(QUIET | {"batch": 2} | options), epochs=2), seed=0)
    assert float(slow.detach()) == pytest.approx(-0.01 * sum(factors), rel=1e-4)
    assert float(fast.detach()) == pytest.approx(-0.1 * sum(factors), rel=1e-4)


@pytest.mark.parametrize("optimiser", ["adam", "nadam"])
def test_steps_are_those_of_the_optimiser(optimiser: str) -> None:
    line, again = Line(), Line()
    options = LoopOptions(**QUIET, epochs=3, optimiser=optimiser, betas=(0.7, 0.9))
    train([Group("w", [line.w], 0.1)], line.fix, range(8), range(8), options, seed=0)
    kind = {"adam": torch.optim.Adam, "nadam": torch.optim.NAdam}[optimiser]
    plain = kind([again.w], lr=0.1, betas=(0.7, 0.9))
    for _ in range(3):
        plain.zero_grad()
        again.fix()(range(8)).mean().backward()
        plain.step()
    torch.testing.assert_close(line.w, again.w)


def test_autocast_is_for_training_only() -> None:
    line, seen = Line(), set()

    def fix() -> Losses:
        def losses(samples: Sequence[int]) -> Tensor:
            product = line.x[list(samples)] @ line.w[:, None]
            seen.add((torch.is_grad_enabled(), product.dtype))
            return (product.float()[:, 0] - line.y[list(samples)]).square()

        return losses

    train([Group("w", [line.w], 0.1)], fix, range(8), range(8), LoopOptions(**QUIET, epochs=1, autocast=True), seed=0)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert line.w.dtype == torch.float32


def test_it_trains_inside_inference_mode() -> None:
    line = Line()
    with torch.inference_mode():
        curve = line.train(epochs=3)
    assert curve.best < curve.before


def test_split_holds_out_a_share() -> None:
    samples = list(range(0, 40, 2))
    learn, judges = split(samples, 0.1, seed=0)
    assert sorted(learn + judges) == samples
    assert len(judges) == 2
    assert (learn, judges) == split(samples, 0.1, seed=0)
    assert judges != split(samples, 0.1, seed=1)[1]
    assert split(samples, 0.0, seed=0) == (samples, samples)
    assert [len(part) for part in split([3, 5], 0.1, seed=0)] == [1, 1]
    assert split([3], 0.5, seed=0) == ([3], [3])
    assert split([], 0.5, seed=0) == ([], [])
