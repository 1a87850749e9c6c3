"""HQQ, half-quadratic quantisation (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog): refit the levels.

    min over scale, zero point of  sum |w - (codes - zero_point) * scale|**p        per group, codes nearest to w

Rounding assigns codes to levels, then the levels move to where their weights are, and so on, as in k-means. With p < 2
the half-quadratic form first takes the outliers e out of the residuals r = w - levels:

    min over e, scale, zero point of  sum |e|**p + beta / 2 * sum (r - e)**2
    e = sign(r) * max(|r| - |r|**(p - 1) / beta, 0);   then least squares of w - e on the codes

The published iteration keeps the range of the extremes and moves a fractional zero point. Zero points are integers
here, and the mean residual of a group, by which one would move, stays below half a step: that iteration would return
what rtn does. Instead:

- It starts from the range with the least squared error: most of the gain, and what the loop alone does not find.
- The scale is refitted, and the integers beside the zero point are tried. On Gaussian groups of 64 that is as good as
  trying every scale with every zero point.
- Residuals are measured in steps. In the unit of the weights (about 0.02) no residual would reach the shrinkage. beta
  stays as it is: growing by 1 % per iteration, as published, moves the objective by less than 0.1 %.
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
    """Options of ``hqq``."""

    clip: Literal["minmax", "mse"] = Field("mse", description="range to start from, as rtn finds it")
    neighbours: int = Field(1, ge=0, le=3, description="zero points tried on either side of the first one")
    norm: float = Field(
        2.0, gt=0, le=2, description="p of the error that is minimised; below 2 outliers count less (published: 0.7)"
    )
    beta: float = Field(10.0, gt=0, description="norm < 2: weight of the quadratic part")
    iterations: int = Field(20, ge=1, le=200, description="most refits of a group for each zero point")


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
    search.descend(torch.arange(len(groups)), zero)
    if not scheme.is_symmetric:
        for distance in range(1, config.neighbours + 1):
            for other in (zero - distance, zero + distance):
                rows = ((other >= 0) & (other < 2**scheme.bits)).flatten().nonzero().flatten()
                search.descend(rows, other[rows])
    return search.scale, search.zero


def shrink(residual: Tensor, norm: float, beta: float) -> Tensor:
    """The e of the half-quadratic form, what counts as outlier: sign(r) * max(|r| - |r|**(norm - 1) / beta, 0)."""
    return residual.abs().pow_(norm - 2).div_(-beta).add_(1).clamp_(min=0).mul_(residual)


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

    def descend(self, rows: Tensor, zero: Tensor) -> None:
        """Alternate codes and scale, from the best scales of ``rows`` and with the zero points ``zero`` [rows, 1].

        A group leaves as soon as its error stops falling.
        """
        scale = self.scale[rows]
        last = torch.full_like(scale, torch.inf)
        for _ in range(self.config.iterations + 1):
            position = self.groups[rows].div_(scale)
            levels = rtn.level_values(rtn.nearest_codes(position, zero, self.scheme), zero, self.scheme)
            residual = position.sub_(levels)
            error = torch.linalg.vector_norm(residual, self.config.norm, dim=-1, keepdim=True).mul_(scale)
            better = (error < self.error[rows]).flatten()
            kept = rows[better]
            self.scale[kept], self.zero[kept], self.error[kept] = scale[better], zero[better], error[better]
            falling = ((error < last) & (error < _HOPELESS * self.error[rows])).flatten()
            if not falling.any():
                break
            if not falling.all():
                rows, scale, zero, error = rows[falling], scale[falling], zero[falling], error[falling]
                levels, residual = levels[falling], residual[falling]
            if self.config.norm < 2:
                residual -= shrink(residual, self.config.norm, self.config.beta)
            # Least squares in steps: <levels, levels + residual> / <levels, levels>. A group of zeros has 0 / 0.
            change = residual.mul_(levels).sum(-1, keepdim=True).div_(levels.square().sum(-1, keepdim=True))
            scale = rtn.as_stored(change.nan_to_num_(0.0).add_(1).mul_(scale), self.scale_dtype)
            last = error
