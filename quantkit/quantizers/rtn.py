"""Round to nearest: one scale (and zero point) per group of input columns, every weight to its nearest level.

    W ~ (codes - zero_point) * scale        codes, zero_point: integers in 0 .. 2**b - 1

The scale is the smallest that keeps every weight of the group within half a step of a level. That range reaches half
a step past the outer levels, where the textbook one, (max - min) / (2**b - 1), ends on them; on Gaussian groups of 64
it lowers the rms error by 9, 5 and 2 % at 2, 3 and 4 bits. ``clip="mse"`` shrinks it further where cutting off the
largest weights pays.

Scales are rounded to their stored dtype before codes are computed, so that a reader of the checkpoint gets exactly
the weights that were judged here. NF4: Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.formats.quantized import NF4_LEVELS, QuantizedWeight
from quantkit.quantizers.grid import by_rows, group_count, group_views
from quantkit.recipe import WeightScheme

_NF4_CELLS = 128
_nf4_boundaries = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
_NF4_CODE = torch.bucketize(torch.linspace(-1, 1, _NF4_CELLS + 1), _nf4_boundaries, out_int32=True)
_NF4_NEXT = torch.cat([_nf4_boundaries, torch.tensor([torch.inf])])[_NF4_CODE]
"""-1 .. 1 in cells so narrow that each holds at most one boundary between levels: the code at the left end of a cell,
and the next boundary. Ten times as fast as a search among the boundaries."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``rtn``."""

    clip: Literal["minmax", "mse"] = Field(
        "minmax", description="range of a group: all of it, or the shrunk one with the least squared error"
    )
    steps: int = Field(default=16, ge=1, le=256, description="clip mse: ranges tried per group")
    smallest: float = Field(
        default=0.4, gt=0, lt=1, description="clip mse: smallest range tried, as a share of the full one"
    )


def quantize(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, config: Config) -> QuantizedWeight:
    """Quantise ``weight``, float32 [out_features, in_features], finite.

    A group of zeros comes back as exact zeros. Scales too small or too large for ``scale_dtype`` become its smallest
    or largest value, never 0 or infinity.
    """
    return round_groups(weight, scheme, scale_dtype, lambda part: find_range(part, scheme, scale_dtype, config))


def round_values(
    weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, config: Config
) -> tuple[Tensor, Tensor]:
    """What ``quantize(...).dequantize()`` gives, bit for bit, without codes in between: float32 as ``weight``, and the
    scales, as they are stored, float32 [rows, groups]."""
    rounded = torch.empty_like(weight)
    scale = torch.empty(len(weight), group_count(weight.shape[1], scheme.group_size))

    def round_rows(chunk: slice) -> None:
        views = (group_views(matrix[chunk], scheme.group_size) for matrix in (weight, rounded))
        first = 0
        for part, out in zip(*views, strict=True):
            step, zero = find_range(part, scheme, scale_dtype, config)
            codes = nearest_codes(torch.div(part, step, out=out), zero, scheme)
            torch.mul(level_values(codes, zero, scheme), step, out=out)
            scale[chunk, first : first + part.shape[1]] = step.squeeze(-1)
            first += part.shape[1]

    by_rows(round_rows, *weight.shape)
    return rounded, scale


def round_groups(
    weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> QuantizedWeight:
    """Every weight of ``weight`` at the nearest level of the scale and zero point that ``choose`` gives its group.

    ``choose`` maps a part of the matrix, [rows, groups, width], to what ``find_range`` returns for it.
    """
    rows, columns = weight.shape
    groups = group_count(columns, scheme.group_size)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(rows, groups, dtype=scale_dtype)
    zero_point = None if scheme.is_symmetric else torch.empty(rows, groups, dtype=torch.uint8)

    def round_rows(chunk: slice) -> None:
        parts = zip(
            group_views(weight[chunk], scheme.group_size), group_views(codes[chunk], scheme.group_size), strict=True
        )
        first = 0
        for part, codes_part in parts:
            group = slice(first, first + part.shape[1])
            part_scale, part_zero = choose(part)
            codes_part.copy_(nearest_codes(part / part_scale, part_zero, scheme))
            scale[chunk, group] = part_scale.squeeze(-1).to(scale_dtype)
            if zero_point is not None:
                zero_point[chunk, group] = part_zero.squeeze(-1).to(torch.uint8)
            first = group.stop

    by_rows(round_rows, rows, columns)
    return QuantizedWeight(codes, scale, zero_point, scheme.bits, scheme.group_size, scheme.levels)


def nearest_codes(position: Tensor, zero: Tensor, scheme: WeightScheme) -> Tensor:
    """Code of the level nearest to ``position``, weights in units of their scale; shapes broadcast.

    0 .. 2**bits - 1, as floats for uniform levels, as integers for NF4.
    """
    if scheme.levels == "nf4":
        cell = position.add(1).mul_(_NF4_CELLS / 2).clamp_(0, _NF4_CELLS).int().flatten()
        codes = _NF4_CODE.index_select(0, cell).view_as(position)
        return codes.add_(position > _NF4_NEXT.index_select(0, cell).view_as(position))
    return position.round().add_(zero).clamp_(0, 2**scheme.bits - 1)


def level_values(codes: Tensor, zero: Tensor, scheme: WeightScheme) -> Tensor:
    """What ``nearest_codes`` stand for, in units of the scale."""
    if scheme.levels == "nf4":
        return NF4_LEVELS.index_select(0, codes.flatten()).view_as(codes)  # five times as fast as NF4_LEVELS[codes]
    return codes - zero


def find_range(
    part: Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype,
    config: Config,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale, as stored in ``scale_dtype``, and zero point of every group of ``part`` [rows, groups, width].

    Both are float32 [rows, groups, 1]; the zero point of NF4 means nothing and is 0. ``importance`` [groups, width]
    weights the squared errors that ``clip="mse"`` compares.
    """
    if scheme.levels == "nf4":
        scale = torch.maximum(part.amax(-1, keepdim=True), part.amin(-1, keepdim=True).neg_())
        zero, widest = torch.zeros_like(scale), 1.0
    else:
        scale, zero = _covering_range(part, scheme.bits, scheme.is_symmetric)
        # The textbook range, (max - min) / largest_code, is wider than the covering one by this factor: try it too.
        widest = 2**scheme.bits / (2**scheme.bits - 1)
    if config.clip == "minmax":
        return as_stored(scale, scale_dtype), zero
    scratch = torch.empty_like(part), torch.empty_like(part)
    root = None if importance is None else importance.sqrt()

    def error(candidate: Tensor) -> Tensor:
        position, level = scratch
        torch.div(part, candidate, out=position)
        if scheme.levels == "nf4":
            level = level_values(nearest_codes(position, zero, scheme), zero, scheme)
        else:
            torch.round(position.add_(zero), out=level).clamp_(0, 2**scheme.bits - 1)
        level.sub_(position)
        if root is not None:
            level.mul_(root)
        return torch.linalg.vector_norm(level, dim=-1, keepdim=True).mul_(candidate)

    return _best_scale(scale, widest, error, scale_dtype, config), zero


def _covering_range(part: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The smallest scale, with its integer zero point, that leaves no weight more than half a step from a level."""
    largest_code = 2**bits - 1
    low = part.amin(-1, keepdim=True).clamp_(max=0).neg_()  # the range always holds 0: the zero point is a code
    high = part.amax(-1, keepdim=True).clamp_(min=0)
    if symmetric:
        zero = torch.full_like(low, 2 ** (bits - 1))
    else:
        width = (low + high).clamp_(min=torch.finfo(torch.float32).smallest_normal)  # a group of zeros: 0 / width = 0
        zero = (low / width).mul_(largest_code).round_()
    return torch.maximum(low / (zero + 0.5), high / (largest_code + 0.5 - zero)), zero


def _best_scale(
    scale: Tensor, widest: float, error: Callable[[Tensor], Tensor], scale_dtype: torch.dtype, config: Config
) -> Tensor:
    """Per group, the multiple of ``scale`` with the least error; ``scale`` itself unless another one is better."""
    best = as_stored(scale, scale_dtype)
    least = error(best)
    for share in [widest, *torch.linspace(1, config.smallest, config.steps + 1).tolist()[1:]]:
        candidate = as_stored(scale * share, scale_dtype)
        candidate_error = error(candidate)
        best = torch.where(candidate_error < least, candidate, best)
        least = torch.minimum(candidate_error, least)
    return best


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as a reader of the checkpoint gets it, in float32; neither 0 nor infinite."""
    stored = torch.finfo(dtype)
    # float16 scales may be subnormal; below float32's normal range division is not reliable, so bfloat16 stops there.
    smallest = max(stored.smallest_normal * stored.eps, torch.finfo(torch.float32).smallest_normal)
    return scale.clamp(smallest, stored.max).to(dtype).float()
