"""Is one model better than another on the same text, or is it noise? A paired bootstrap over the windows.

Both models lose on the same windows, so what is hard about a window cancels in the difference: the interval of the
ratio is many times narrower than that of either perplexity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ratio(NamedTuple):
    """Perplexity over the baseline's, with an interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Is 1 outside of the interval?"""
        return not self.low <= 1 <= self.high


def perplexity_ratio(nll: Tensor, baseline: Tensor, *, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """exp(mean(nll - baseline)) with its bootstrap interval (percentiles of 2,000 resamples of the windows).

    Args:
        nll: [windows] mean loss of each window; windows of equal length.
        baseline: [windows], of the other model on the same windows.

    Raises:
        ValueError: the two do not come from the same windows.
    """
    if nll.shape != baseline.shape:
        raise ValueError(f"losses of {len(nll)} and {len(baseline)} windows cannot be paired")
    difference = nll.double() - baseline.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(difference), (2000, len(difference)), generator=generator)
    means = difference[drawn].mean(dim=1).sort().values
    tail = (1 - confidence) / 2
    low, high = (means[round(q * (len(means) - 1))].exp() for q in (tail, 1 - tail))
    return Ratio(float(difference.mean().exp()), float(low), float(high))
