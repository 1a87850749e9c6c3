"""SINQ (Mueller et al., arXiv 2509.22944): column scales that balance a weight matrix before it is rounded.

    y = W @ x   becomes   y = (W / t) @ (x * t)        t: [in_features], t > 0

t makes the standard deviations of the columns equal inside each group of input columns, after every row has been
scaled to the same standard deviation there (Sinkhorn's alternation). Only weights are needed. The row factor serves
the iteration alone: a scale per row and group follows, and rounding does not see a factor it takes out again.

Against the published iteration: columns and rows alternate instead of moving at once, so it converges instead of
oscillating; no absolute clamps, so the result does not depend on the unit of the weights; a matrix is only ever read
(per sweep one pass that forms first and second moments), so a sweep costs about as much as rounding does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.models.block import Block, Site
from quantkit.quantizers.grid import group_views, row_chunks
from quantkit.recipe import PER_CHANNEL, WeightScheme

CACHE_ELEMENTS = 1 << 22
"""Elements of a block of columns that all sweeps visit before the next: 16 MiB of float32, within a shared cache."""
SAMPLE_ROWS = 512
"""Rows the first sweeps look at, spread over the matrix; sweeps over all rows then start from an imbalance of about
1.2, and one of them is enough."""
_LARGEST = 1e3
"""Bounds of t, relative to its geometric mean in a group; keeps scaled activations inside float16."""
_CONSTANT = 1e-5
"""A variance below this share of the second moment is rounding noise of a constant row or column."""
_DEAD = 1e-6
"""A column with less than this share of the median standard deviation of its group carries nothing: t stays 1."""
_NEARLY_BALANCED = 1.25
"""Imbalance (largest over smallest standard deviation) from which one more update needs no check."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``sinq``."""

    exponent: float = Field(1.0, ge=0, le=1, description="t**exponent is used; 1: the paper, 0: plain rounding")
    sweeps: int = Field(4, ge=1, le=64, description="most alternations of columns and rows")
    absorb: Literal["auto", "never"] = Field(
        "auto", description="fold t into the preceding operation where there is one, or always keep it per linear"
    )


@dataclass(frozen=True)
class Solution:
    """Column scales of one block, float32, geometric mean 1."""

    sites: dict[str, Tensor]
    """Site name -> t over the site's signal; to be folded into producer and consumers."""
    linears: dict[str, Tensor]
    """Linear name -> t over its input columns; to be multiplied onto its input at run time."""


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> set[str]:
    """Which of ``linears`` may need t at run time: those that no site covers; all with ``absorb: never``."""
    if config.absorb == "never":
        return set(linears)
    return set(linears) - {consumer for site in sites for consumer in site.consumers}


def solve(block: Block, linears: Collection[str], scheme: WeightScheme, config: Config) -> Solution:
    """Column scales for the quantised ``linears`` of ``block``; the block is not changed.

    Consumers of a site share one t, found on their vertical concatenation; consumers that stay in full precision
    have no say in it. A t that is 1 everywhere is left out.
    """
    per_linear = online(block.sites, linears, config)
    site_scales = {}
    for site in block.sites:
        weights = [block.weight(name) for name in site.consumers if name in linears and name not in per_linear]
        if weights:
            site_scales[site.name] = column_scale(weights, scheme.group_size, config, site.repeats, site.head_dim)
    linear_scales = {name: column_scale([block.weight(name)], scheme.group_size, config) for name in sorted(per_linear)}
    return Solution(_drop_ones(site_scales), _drop_ones(linear_scales))


def _drop_ones(scales: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in scales.items() if (t - 1).abs().max() > 1e-6}


def column_scale(
    weights: Sequence[Tensor], group_size: int, config: Config, repeats: int = 1, head_dim: int = 0
) -> Tensor:
    """t of the matrices ``weights``, each float32 [rows_i, columns], that read one signal.

    They count as one matrix, stacked along the rows. With ``repeats`` > 1 (grouped heads) the columns are
    [kv_heads, repeats, head_dim] and the repeats of a head share t.

    Returns:
        float32 [signal width]: columns / repeats. Geometric mean 1 in every group (over all columns if shared).
    """
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    width = columns if group_size == PER_CHANNEL else min(group_size, columns)
    if repeats > 1:
        t = _balance(weights, width, config, (repeats, head_dim))
        return t.unflatten(0, (-1, repeats, head_dim))[:, 0].flatten().contiguous()
    step = max(1, CACHE_ELEMENTS // (rows * width)) * width
    return torch.cat(
        [_balance([w[:, start : start + step] for w in weights], width, config) for start in range(0, columns, step)]
    )


def _balance(weights: Sequence[Tensor], width: int, config: Config, tie: tuple[int, int] | None = None) -> Tensor:
    """t [columns]; ``tie``: (repeats, head_dim) of columns that share t."""
    columns = weights[0].shape[1]
    # What shares one imbalance, one geometric mean and one stop: a group, or everything if columns are tied across.
    unit = columns if tie else width
    t = _units(torch.ones(columns), unit)
    every = sum(weight.shape[0] for weight in weights) // SAMPLE_ROWS
    if every > 1:
        t = _alternate([weight[::every] for weight in weights], t, columns, width, config.sweeps, tie)
    t = _alternate(weights, t, columns, width, config.sweeps, tie)
    return _normalised(t.pow(config.exponent), t != 1).flatten()[:columns]


def _alternate(
    weights: Sequence[Tensor], start: Tensor, columns: int, width: int, sweeps: int, tie: tuple[int, int] | None
) -> Tensor:
    """Sinkhorn's alternation from ``start`` [units, unit]: the iterate of least imbalance.

    Below an imbalance of _NEARLY_BALANCED a sweep divides what is left of it by about half the group's width, so the
    next iterate is taken without the pass that would confirm it.
    """
    now = best = start
    least, running = torch.tensor(torch.inf), torch.tensor(True)
    for sweep in range(sweeps + 1):
        spread = _column_spread(weights, now.flatten()[:columns], width)
        spread = _units(_pool(spread, *tie) if tie else spread, start.shape[1])
        live = spread > _DEAD * spread.median(dim=1, keepdim=True).values
        imbalance = _imbalance(spread, live)
        better = running & (imbalance < least)
        after = _normalised(now * spread, live).clamp(1 / _LARGEST, _LARGEST)
        closing = (imbalance < _NEARLY_BALANCED) & (sweep < sweeps)
        best = torch.where(better, torch.where(closing, after, now), best)
        running = better & (imbalance < 0.99 * least) & ~closing
        least = torch.minimum(imbalance, least)
        if not running.any():
            break
        now = after
    return best


def _column_spread(weights: Sequence[Tensor], t: Tensor, width: int) -> Tensor:
    """Standard deviation [columns] of the columns of W / t once every row of a group has standard deviation 1.

    Up to one factor per group. 0 for a constant column; a row that is constant in a group is left out there.
    """
    inverse = t.reciprocal()[None]
    first, second = torch.zeros_like(inverse), torch.zeros_like(inverse)
    sums = zip(group_views(inverse, width), group_views(first, width), group_views(second, width), strict=True)
    for part, (factor, part_first, part_second) in enumerate(sums):
        part_first, part_second = part_first.transpose(0, 1), part_second.transpose(0, 1)  # [groups, 1, width]
        for weight in weights:
            scratch = torch.empty(0)
            for chunk in row_chunks(*weight.shape):
                view = group_views(weight[chunk], width)[part]  # [rows, groups, width], as are x and its square
                if scratch.shape[1:] != view.shape:
                    scratch = torch.empty(2, *view.shape)
                x, squares = scratch
                torch.mul(view, factor, out=x)
                torch.mul(x, x, out=squares)
                variance, live = _variance(x.sum(-1), squares.sum(-1), x.shape[2])
                # [groups, 1, rows]; contiguous, or bmm is several times slower
                weighting = torch.where(live, variance.reciprocal_(), 0.0).t().contiguous().unsqueeze(1)
                part_second.baddbmm_(weighting, squares.transpose(0, 1))
                part_first.baddbmm_(weighting.sqrt_(), x.transpose(0, 1))
    variance, live = _variance(first[0], second[0], sum(weight.shape[0] for weight in weights))
    return torch.where(live, variance.sqrt(), 0.0)


def _variance(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` times the variance of ``count`` values from the sums of the values and of their squares.

    And whether it is more than the rounding noise of a constant.
    """
    variance = torch.addcmul(second, first, first, value=-1 / count)
    return variance, variance > second * _CONSTANT


def _pool(spread: Tensor, repeats: int, head_dim: int) -> Tensor:
    """Root mean square over the repeats of a head, for every one of them."""
    heads = spread.unflatten(0, (-1, repeats, head_dim))
    return heads.square().mean(1, keepdim=True).sqrt().expand_as(heads).flatten()


def _units(values: Tensor, unit: int) -> Tensor:
    """[columns] as [units, unit]; the places a short last unit lacks are 0."""
    return torch.nn.functional.pad(values, (0, -values.numel() % unit)).unflatten(0, (-1, unit))


def _imbalance(spread: Tensor, live: Tensor) -> Tensor:
    """Largest over smallest standard deviation of the ``live`` columns, [units, 1]; the rows' are equal by then."""
    largest = spread.masked_fill(~live, 0).amax(1, keepdim=True)
    smallest = spread.masked_fill(~live, torch.inf).amin(1, keepdim=True)
    return torch.where(smallest.isinf(), 1.0, largest / smallest)


def _normalised(t: Tensor, live: Tensor) -> Tensor:
    """t with geometric mean 1 over the ``live`` columns of each unit; 1 elsewhere."""
    logs = torch.where(live, t, 1.0).log()
    mean = logs.sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)
    return torch.where(live, (logs - mean).exp(), 1.0)
