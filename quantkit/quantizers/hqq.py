"""HQQ, half-quadratic quantisation (Badri and Shaji, 2023; Mobius Labs, github.com/mobiusml/hqq): refit the levels.

    min over scale, zero point of  sum |w - (codes - zero_point) * scale|**p        per group, codes nearest to w

Rounding assigns codes to levels; then the levels are moved to where their weights are, and so on, as in k-means. With
p < 2 the half-quadratic form takes the outliers out first:

    min over e, scale, zero point of  sum |e|**p + beta / 2 * sum (w - e - levels)**2
    e = sign(r) * max(|r| - |r|**(p - 1) / beta, 0), r = w - levels;   then least squares of w - e on the codes

Against the published iteration, which keeps the range of the extremes and moves a fractional zero point only:

- It starts from the range with the least squared error. That is most of the gain, and the loop alone does not find it.
- The scale is refitted too. Zero points are stored as integers, so the fitted one is rounded, the scale is fitted
  again, and the neighbouring zero points are tried.
- Residuals are measured in steps. In the unit of the weights (about 0.02) the shrinkage is 0 and p has no effect.
- The best iterate is kept, judged with the scale as stored; a group is never worse than its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.formats.quantized import QuantizedWeight
from quantkit.quantizers import rtn
from quantkit.recipe import WeightScheme

_HOPELESS = 1.1
"""Times the best error of a group: an attempt that is further off is given up. It loses 0.02 % of the gain at most and
saves half of the time."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``hqq``.

    The authors' code, as far as integer zero points allow, is clip minmax, fit zero, neighbours 0, norm 0.7 and unit
    weight. They allow it nothing: no mean residual of a group reaches half a step, so the result is that of rtn.
    """

    clip: Literal["minmax", "mse"] = Field("mse", description="range to start from, as rtn finds it")
    fit: Literal["scale", "zero"] = Field(
        "scale", description="refit the scale and, where there is one, the zero point; or only the zero point"
    )
    neighbours: int = Field(1, ge=0, le=3, description="zero points tried on either side of the fitted one")
    norm: float = Field(2.0, gt=0, le=2, description="p of the error that is minimised; below 2 outliers count less")
    unit: Literal["step", "weight"] = Field("step", description="unit of the residuals that are shrunk (norm < 2)")
    beta: float = Field(10.0, gt=0, description="weight of the quadratic part at the start (norm < 2)")
    growth: float = Field(1.01, ge=1, description="factor on beta in every iteration (norm < 2)")
    iterations: int = Field(20, ge=1, le=200, description="most refits of a group")


def quantize(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, config: Config) -> QuantizedWeight:
    """Quantise ``weight``, float32 [out_features, in_features], finite; zeros and extremes as in ``rtn.quantize``."""

    def choose(part: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = rtn.find_range(part, scheme, scale_dtype, rtn.Config(clip=config.clip))
        fit = refit(part.flatten(0, 1), scale.flatten(0, 1), zero.flatten(0, 1), scheme, scale_dtype, config)
        return fit[0].view_as(scale), fit[1].view_as(zero)

    return rtn.round_groups(weight, scheme, scale_dtype, choose)


def refit(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, config: Config
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, [groups, 1], that lose no more of ``groups``, [groups, width], than the given ones.

    Scales come and go as they are stored, zero points as integers, all float32. Loss: sum |error|**norm of a group.
    """
    worst = torch.full_like(scale, torch.inf)
    search = _Search(groups, scheme, scale_dtype, config, scale.clone(), zero.clone(), worst)
    everything = torch.arange(len(groups))
    search.descend(everything, zero, move_zero=not scheme.is_symmetric)
    if not scheme.is_symmetric:
        fitted = search.zero.clone()
        for step in range(1, config.neighbours + 1):
            for zero in (fitted - step, fitted + step):
                rows = ((zero >= 0) & (zero < 2**scheme.bits)).flatten().nonzero().flatten()
                search.descend(rows, zero[rows], move_zero=False)
    return search.scale, search.zero


@dataclass(frozen=True)
class _Search:
    """The best scale and zero point of each group so far, [groups, 1]; ``descend`` updates them in place."""

    groups: Tensor
    scheme: WeightScheme
    scale_dtype: torch.dtype
    config: Config
    scale: Tensor
    zero: Tensor
    error: Tensor

    def descend(self, rows: Tensor, zero: Tensor, move_zero: bool) -> None:
        """Alternate codes and least squares from the best scales of ``rows`` and from ``zero`` [rows, 1].

        A group leaves as soon as its error stops falling.
        """
        scale, beta = self.scale[rows], self.config.beta
        last = torch.full_like(scale, torch.inf)
        for _ in range(self.config.iterations + 1):
            position = self.groups[rows].div_(scale)
            levels = rtn.level_values(rtn.nearest_codes(position, zero, self.scheme), zero, self.scheme)
            residual = position.sub_(levels)
            error = torch.linalg.vector_norm(residual, self.config.norm, dim=-1, keepdim=True)
            better = (error < self.error[rows]).flatten()
            kept = rows[better]
            self.scale[kept], self.zero[kept], self.error[kept] = scale[better], zero[better], error[better]
            falling = ((error < last) & (error < _HOPELESS * self.error[rows])).flatten()
            if not falling.any():
                break
            if not falling.all():
                rows, scale, zero, error = rows[falling], scale[falling], zero[falling], error[falling]
                levels, residual = levels[falling], residual[falling]
            scale, zero = self._least_squares(levels, residual, scale, zero, beta, move_zero)
            last, beta = error, beta * self.config.growth

    def _least_squares(
        self, levels: Tensor, residual: Tensor, scale: Tensor, zero: Tensor, beta: float, move_zero: bool
    ) -> tuple[Tensor, Tensor]:
        """The scale and zero point that bring ``levels`` [rows, width] closest to the weights, levels + residual.

        Both in steps, as are all moments here; the results are what would be stored.
        """
        if self.config.norm < 2:
            residual = residual - self._outliers(residual, scale, beta)
        target = levels + residual
        first, target_first = levels.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
        second, product = levels.square().mean(-1, keepdim=True), target.mul_(levels).mean(-1, keepdim=True)
        move = torch.zeros_like(zero)
        if move_zero:
            slope = torch.ones_like(scale)
            if self.config.fit == "scale":
                spread = second - first * first
                on_one_level = spread <= 1e-6 * second  # then any slope fits, and this is the one of the next step
                slope = torch.where(on_one_level, slope, (product - first * target_first) / spread)
            move = (zero + first - target_first / slope).round_().clamp_(0, 2**self.scheme.bits - 1).sub_(zero)
        if self.config.fit == "scale":
            factor = (product - move * target_first) / (second - 2 * move * first + move * move)
            scale = rtn.as_stored(factor.nan_to_num_(1.0) * scale, self.scale_dtype)  # a group of zeros has 0 / 0
        return scale, zero + move

    def _outliers(self, residual: Tensor, scale: Tensor, beta: float) -> Tensor:
        """The e of the half-quadratic form: ``residual``, in steps, less |r|**(norm - 1) / beta."""
        size = residual.abs()
        if self.config.unit == "weight":
            size.mul_(scale)
        return size.pow_(self.config.norm - 2).div_(-beta).add_(1).clamp_(min=0).mul_(residual)
