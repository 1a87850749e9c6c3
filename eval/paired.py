"""Is one model better than another on the same text, or is it noise? A paired bootstrap over the windows.

Both models lose on the same windows, so what is hard about a window cancels in the difference: the interval of the
ratio is many times narrower than that of either perplexity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
DRAWN_AT_ONCE = 10_000_000
"""Numbers in memory at a time."""


class Ratio(NamedTuple):
    """Perplexity over the baseline's, with an interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Is 1 outside of the interval?"""
        return not self.low <= 1 <= self.high


class Difference(NamedTuple):
    """A mean minus the baseline's, with an interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Is 0 outside of the interval?"""
        return not self.low <= 0 <= self.high


def perplexity_ratio(nll: Tensor, baseline: Tensor, *, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """exp(mean(nll - baseline)) with its bootstrap interval.

    Args:
        nll: [windows] mean loss of each window; windows of equal length.
        baseline: [windows], of the other model on the same windows.

    Raises:
        ValueError: the two do not come from the same windows.
    """
    return Ratio(*(math.exp(end) for end in mean_difference(nll, baseline, confidence=confidence, seed=seed)))


def mean_difference(values: Tensor, baseline: Tensor, *, confidence: float = 0.95, seed: int = 0) -> Difference:
    """mean(values - baseline) with its bootstrap interval (percentiles of 2,000 resamples).

    Args:
        values: [n], one for each window or document.
        baseline: [n], of the other model on the same ones.

    Raises:
        ValueError: the two do not come from the same ones.
    """
    if values.shape != baseline.shape:
        raise ValueError(f"{len(values)} and {len(baseline)} windows or documents cannot be paired")
    difference = values.double() - baseline.double()
    count = len(difference)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(RESAMPLES, DRAWN_AT_ONCE // count))
    means = torch.cat(
        [
            difference[torch.randint(0, count, (min(at_once, RESAMPLES - done), count), generator=generator)].mean(
                dim=1
            )
            for done in range(0, RESAMPLES, at_once)
        ]
    )
    means = means.sort().values
    tail = (1 - confidence) / 2
    low, high = (means[round(q * (len(means) - 1))] for q in (tail, 1 - tail))
    return Difference(float(difference.mean()), float(low), float(high))
