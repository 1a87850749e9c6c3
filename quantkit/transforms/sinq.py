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
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.models.block import Site
from quantkit.quantizers.grid import by_rows, group_views, serial_operations
from quantkit.recipe import PER_CHANNEL
from quantkit.transforms.interface import Online, SiteChange, Situation, Solution

SAMPLE_ROWS = 256
"""Rows the first sweeps look at, spread over the matrix. Their t is off by the noise of a standard deviation over so
many values, an imbalance of about 1.3 in all, from where one sweep over all rows reaches the end."""
_LARGEST = 1e3
"""Bounds of t, relative to its geometric mean in a group; keeps scaled activations inside float16."""
_CONSTANT = 1e-5
"""A variance below this share of the second moment is rounding noise of a constant row or column."""
_TINY = torch.finfo(torch.float32).smallest_normal
_DEAD = 1e-6
"""A column with less than this share of the median standard deviation of its group carries nothing: t stays 1."""
_NEARLY_BALANCED = 1.5
"""Imbalance (largest over smallest standard deviation) from which one more update needs no check."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``sinq``."""

    exponent: float = Field(1.0, ge=0, le=1, description="t**exponent is used; 1: the paper, 0: plain rounding")
    sweeps: int = Field(4, ge=1, le=64, description="most alternations of columns and rows")
    absorb: Literal["auto", "never"] = Field(
        "auto", description="fold t into the preceding operation where there is one, or always keep it per linear"
    )


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    """Which of ``linears`` may need t at run time: those that no foldable site covers; all with ``absorb: never``."""
    covered = {consumer for site in sites if site.kind != "none" for consumer in site.consumers}
    alone = set(linears) if config.absorb == "never" else set(linears) - covered
    return dict.fromkeys(sorted(alone), frozenset({"scale"}))


def solve(situation: Situation, config: Config) -> Solution:
    """Column scales for the quantised linears of a block.

    Consumers of a site share one t, found on their vertical concatenation; consumers that stay in full precision
    have no say in it. A t that is 1 everywhere is left out.
    """
    block, linears = situation.block, situation.linears
    per_linear = online(block.sites, linears, config)

    def scale_of(names: Sequence[str], site: Site | None) -> Tensor:
        weights = [block.weight(name) for name in names]
        tie = (site.repeats, site.head_dim) if site else (1, 0)
        return column_scale(weights, situation.weights_of(names[0]).group_size, config, *tie)

    sites = {}
    for site in block.sites:
        names = [name for name in site.consumers if name in linears and name not in per_linear]
        if names:
            sites[site.name] = scale_of(names, site)
    alone = {name: scale_of([name], None) for name in per_linear}
    changes = {name: SiteChange(scale=t) for name, t in sites.items() if _matters(t)}
    return Solution(changes, {name: t for name, t in alone.items() if _matters(t)})


def _matters(t: Tensor) -> bool:
    return bool((t - 1).abs().max() > 1e-6)


@serial_operations()
def column_scale(
    weights: Sequence[Tensor], group_size: int, config: Config, repeats: int = 1, head_dim: int = 0
) -> Tensor:
    """t of the matrices ``weights``, each float32 [rows_i, columns], that read one signal.

    They count as one matrix, stacked along the rows. With ``repeats`` > 1 (grouped heads) the columns are
    [kv_heads, repeats, head_dim] and the repeats of a head share t.

    Returns:
        float32 [signal width]: columns / repeats. Geometric mean 1 in every group (over all columns if shared).
    """
    columns = weights[0].shape[1]
    width = columns if group_size == PER_CHANNEL else min(group_size, columns)
    if repeats > 1:
        t = _balance(weights, width, config, (repeats, head_dim))
        return t.unflatten(0, (-1, repeats, head_dim))[:, 0].flatten().contiguous()
    return _balance(weights, width, config)


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

    Close to balance, a column that is corrected by c gives 2 / width of log c back through its share of the rows'
    deviations (Gaussian entries); the correction below takes that in advance. What is left after a sweep is then a
    hundredth of what was there, so below _NEARLY_BALANCED the next iterate is taken without a pass to confirm it.
    """
    correction = 1 + 2 / (width + 2)  # + 2: not past the goal in narrow groups
    now = best = start
    least, running = torch.tensor(torch.inf), torch.tensor(True)
    for sweep in range(sweeps + 1):
        spread = _column_spread(weights, now.flatten()[:columns], width)
        spread = _units(_tied(spread, width, *tie) if tie else spread, start.shape[1])
        live = spread > _DEAD * spread.median(dim=1, keepdim=True).values
        imbalance = _imbalance(spread, live)
        better = running & (imbalance < least)
        after = _normalised(now * spread.pow(correction), live).clamp(1 / _LARGEST, _LARGEST)
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
    spread = []
    rows = sum(weight.shape[0] for weight in weights)
    for part, factor in enumerate(group_views(t.reciprocal()[None], width)):
        first, second = torch.zeros(factor.shape[1:]), torch.zeros(factor.shape[1:])
        for weight in weights:
            view = group_views(weight, width)[part]

            def moments(chunk: slice, view: Tensor = view, factor: Tensor = factor) -> tuple[Tensor, Tensor]:
                return _column_moments(view[chunk], factor)

            for chunk_first, chunk_second in by_rows(moments, *weight.shape):
                first += chunk_first
                second += chunk_second
        variance, live = _variance(first, second, rows)
        spread.append(torch.where(live, variance.sqrt(), 0.0).flatten())
    return torch.cat(spread)


def _column_moments(part: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums [groups, width] of values and squares of ``part`` [rows, groups, width] * ``factor`` [1, groups,
    width] once every row of a group has standard deviation 1, up to one factor."""
    x = part * factor
    squares = x * x
    variance, live = _variance(x.sum(-1), squares.sum(-1), x.shape[2])
    # [groups, 1, rows]; contiguous, or bmm is several times slower
    weighting = torch.where(live, variance.reciprocal_(), 0.0).t().contiguous().unsqueeze(1)
    second = torch.bmm(weighting, squares.transpose(0, 1)).squeeze(1)
    return torch.bmm(weighting.sqrt_(), x.transpose(0, 1)).squeeze(1), second


def _variance(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` times the variance of ``count`` values from the sums of the values and of their squares.

    And whether it is more than the rounding noise of a constant.
    """
    variance = torch.addcmul(second, first, first, value=-1 / count)
    return variance, variance > (second * _CONSTANT).clamp_(min=_TINY)


def _tied(spread: Tensor, width: int, repeats: int, head_dim: int) -> Tensor:
    """The part of ``spread`` [columns] that a factor shared by the repeats of a head can take out; 0 where dead.

    A group's own level does not matter and is not comparable between groups, so this is the least-squares fit of
    log spread = log level[group] + log tied[head, channel], over the live columns.
    """
    live = (spread > 0).float()
    logs = torch.where(spread > 0, spread, 1.0).log()

    def group_mean(values: Tensor) -> Tensor:
        mean = _units(values * live, width).sum(1) / _units(live, width).sum(1).clamp(min=1)
        return mean.repeat_interleave(width)[: values.numel()]

    def head_mean(values: Tensor) -> Tensor:
        heads, count = (x.unflatten(0, (-1, repeats, head_dim)) for x in (values * live, live))
        return (heads.sum(1, keepdim=True) / count.sum(1, keepdim=True).clamp(min=1)).expand_as(heads).flatten()

    tied = head_mean(logs - group_mean(logs))
    for _ in range(32):  # alternating projections; two are enough unless groups cut through heads
        tied = head_mean(logs - group_mean(logs - tied))
    return torch.where(head_mean(live) > 0, tied.exp(), 0.0)


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
