"""What OS+ chooses from for one signal: shifts z and scales s, in the forms that ``os_plus.py`` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit.calibrate.statistics import InputStatistics
from quantkit.models.block import Site
from quantkit.transforms.awq import candidate_scale
from quantkit.transforms.smoothquant import smoothing_scale

ShiftKind = Literal["none", "mean", "median", "percentiles", "midrange"]
Form = Literal["threshold", "smooth", "mean"]

_THRESHOLDS = 16
"""Coarse grid of t, even on a log scale. With the refinement it is within 1 % of 100 even steps on a linear one."""
_ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
_EXPONENTS = (0.2, 0.4, 0.6, 0.8, 1.0)
_REFINEMENT = 5
"""A step of the coarse grids, on both sides of the best candidate, is divided by this."""
_SMALLEST = 0.1
"""The lowest t is this quantile of m: below it, hardly a channel is left that the others could be brought down to."""
_LARGEST = 1e4
"""Bound of s: t is no smaller than the largest m over this; keeps norms and weights inside float16."""


class Candidate(NamedTuple):
    """One point of the search."""

    shift: ShiftKind
    form: Form
    value: float
    """t, alpha or r."""

    @property
    def kind(self) -> tuple[ShiftKind, Form]:
        """What it shares with its neighbours on a grid."""
        return self.shift, self.form


class Signal:
    """What the consumers of a site read, one value per channel of the signal, and what s and z may be made of it.

    Query heads that read one key/value head count as more tokens of it: what they share is decided by all of them.
    """

    def __init__(
        self,
        site: Site,
        seen: InputStatistics,
        ends: tuple[Tensor, Tensor],
        weights: Sequence[Tensor],
        shifts: Sequence[ShiftKind],
    ) -> None:
        """
        Args:
            seen: of the input of the consumers, with ``mean`` and ``rows``.
            ends: the smallest and the largest value of every channel of this input, [columns] each.
            weights: float32 [rows_i, columns] of the consumers that are quantised.
            shifts: those to choose from.
        """
        self._rows = _by_head(site, seen.rows).flatten(0, 1)
        self._low, self._high = _by_head(site, ends[0]).amin(0), _by_head(site, ends[1]).amax(0)
        self._weight = _by_head(site, torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)).amax(0)
        mean = _by_head(site, seen.mean).mean(0)
        self.shifts: dict[ShiftKind, Tensor] = {kind: self._shift(kind, mean) for kind in shifts}
        """z, float32 [width]."""
        self.reach = {kind: self._reach(z) for kind, z in self.shifts.items()}
        """m, float32 [width]."""

    def _shift(self, kind: ShiftKind, mean: Tensor) -> Tensor:
        if kind == "none":
            return torch.zeros_like(mean)
        if kind == "mean":
            z = mean
        elif kind == "median":
            z = self._quantile(0.5)
        elif kind == "percentiles":
            z = (self._quantile(0.01) + self._quantile(0.99)) / 2
        else:
            z = (self._low + self._high) / 2
        return torch.where(z.isfinite(), z, 0.0)

    def _quantile(self, q: float) -> Tensor:
        """Nearest rank."""
        return self._rows.kthvalue(1 + round(q * (len(self._rows) - 1)), dim=0).values

    def _reach(self, z: Tensor) -> Tensor:
        m = torch.maximum(self._high - z, z - self._low)
        # What is left of a constant is rounding.
        return torch.where(m.isfinite() & (m > 4 * torch.finfo(m.dtype).eps * z.abs()), m, 0.0)

    def scale(self, candidate: Candidate) -> Tensor:
        """s, float32 [width]; 1 at channels where nothing, or a constant that is shifted away, arrives."""
        reach = self.reach[candidate.shift]
        if candidate.form == "threshold":
            return (reach / candidate.value).clamp(min=1) if candidate.value else torch.ones_like(reach)
        if candidate.form == "smooth":
            s = smoothing_scale(reach, self._weight, candidate.value).clamp(1 / _LARGEST, _LARGEST)
        else:
            mean = (self._rows - self.shifts[candidate.shift]).abs().mean(0) * (reach > 0)
            s = candidate_scale(mean, self._weight, candidate.value, duo=False)
        return torch.where(s.isfinite(), s, 1.0)

    def largest(self, kind: ShiftKind) -> Candidate:
        """The shift alone: no channel exceeds this t, s = 1."""
        return Candidate(kind, "threshold", float(self.reach[kind].max()))

    def candidates(self) -> list[Candidate]:
        """The coarse grids; the identity is the first."""
        found = []
        for kind in self.shifts:
            t, ratio = self.largest(kind).value, self._ratio(kind)
            found += [Candidate(kind, "threshold", t * ratio**step) for step in range(_THRESHOLDS)]
            found += [Candidate(kind, "smooth", alpha) for alpha in _ALPHAS]
            found += [Candidate(kind, "mean", r) for r in _EXPONENTS]
        return list(dict.fromkeys(found))

    def near(self, best: Candidate) -> list[Candidate]:
        """What lies between ``best`` and its neighbours on the coarse grid."""
        steps = [step / _REFINEMENT for step in range(1 - _REFINEMENT, _REFINEMENT) if step]
        if best.form == "threshold":
            ratio, most = self._ratio(best.shift), self.largest(best.shift).value
            values = [t for t in (best.value * ratio**step for step in steps) if t < most and t != best.value]
        else:
            grid = _ALPHAS if best.form == "smooth" else _EXPONENTS
            values = [value for value in (best.value + (grid[1] - grid[0]) * step for step in steps) if 0 < value <= 1]
        return [best._replace(value=value) for value in values]

    def released(self, kind: ShiftKind, lowest: float) -> list[Candidate]:
        """The grid of the authors' code: t from max|x - z| down to ``lowest`` in even steps."""
        most = self.largest(kind).value
        count = max(100, int(float((self._high - self.shifts[kind]).max()) / 0.5))
        values = [most - step * (most - lowest) / count for step in range(count + 1)] if most > lowest else [most]
        return [Candidate(kind, "threshold", value) for value in values]

    def _ratio(self, kind: ShiftKind) -> float:
        """Of neighbouring thresholds on the coarse grid, at most 1."""
        reach = self.reach[kind]
        live = reach[reach > 0]
        if not len(live):
            return 1.0
        most = float(live.max())
        least = max(float(live.kthvalue(1 + round(_SMALLEST * (len(live) - 1))).values), most / _LARGEST)
        return float((least / most) ** (1 / (_THRESHOLDS - 1)))


def _by_head(site: Site, columns: Tensor) -> Tensor:
    """[..., columns] of the consumers as [..., heads that share a channel, signal width]."""
    if site.repeats == 1:
        return columns.unsqueeze(-2)
    return columns.unflatten(-1, (-1, site.repeats, site.head_dim)).movedim(-2, -3).flatten(-2)
