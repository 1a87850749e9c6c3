"""AWQ (Lin et al., arXiv 2306.00978): scale up the columns that meet large inputs, then cut off groups' extremes.

    y = W @ x   becomes   y = (W * s) @ (x / s)        s: [in_features], s > 0

    plain  s = a**r                                    eq. 5; a: mean|x|
    duo    s = a**r / (b**(1 - r) + 1e-4)              the authors' code; b: mean over rows of |W| / max|W| of a group

r is searched between 0 and 1 for every site by the error of what the rounded weights compute: of the attention module
or MLP that reads the signal, or of the linear itself. 1/s is folded into what makes the signal.

Then, per row and group of columns, the smallest and largest weight that are kept, by the error of the group's part of
the output on sampled inputs. Only round to nearest asks for that: other roundings choose their range themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.calibrate.replay import Substitute
from quantkit.kernels.reference import fake_quantize
from quantkit.models.block import Block, Site
from quantkit.quantizers.grid import by_rows, group_views, serial_operations
from quantkit.recipe import PER_CHANNEL, ActivationScheme, WeightScheme
from quantkit.transforms.fold import consumer_columns
from quantkit.transforms.interface import InputOp, Observed, Online, SiteChange, Situation, Solution, online_sites

_FINE = 100
"""Steps from 0 to 1 in which r is refined."""
_LARGEST = 1e3
"""Bounds of s, relative to the middle of its range; keeps inputs inside float16."""
_EPS = 1e-4
"""Of the duo form, as the authors have it."""
_SHARES = [1 - step / 20 for step in range(11)]
"""Of a group's range: what clipping may leave of either end."""
FEWEST_ROWS = 32
"""Inputs from which anything is concluded about a signal. Experts may see fewer."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``awq``."""

    steps: int = Field(
        20, ge=1, le=100, description="values of r tried from 0 to 1, before the best is refined to 0.01"
    )
    search_tokens: int = Field(2048, ge=1, description="calibration tokens that judge a scale")
    clip: bool = Field(True, description="search limits for the weights, too; only before rtn")
    online: bool = Field(
        False, description="also scale inputs that nothing can be folded into, at run time (behind GELU, for example)"
    )


class Choice(NamedTuple):
    """One candidate of the search; the smallest is the best: ties go to the smaller r, then to the plain form."""

    loss: float
    r: float
    duo: bool

    @property
    def identity(self) -> bool:
        return self.r == 0 and not self.duo


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    found = list(sites)
    scale: frozenset[InputOp] = frozenset({"scale"})
    alone = uncovered(found, linears) if config.online else []
    return online_sites(found, linears, scale) | dict.fromkeys(alone, scale)


def uncovered(sites: Iterable[Site], linears: Iterable[str]) -> list[str]:
    """Those of ``linears`` that read no site."""
    covered = {name for site in sites for name in site.consumers}
    return [name for name in linears if name not in covered]


def solve(situation: Situation, config: Config) -> Solution:
    """Scales for the sites of a block, and limits for its linears where ``rtn`` follows."""
    observed, block = situation.observed, situation.block
    assert observed is not None
    alone = uncovered(block.sites, situation.linears) if config.online else []
    scales: dict[str, Tensor] = {}  # site, or linear that reads none -> s
    facts: list[dict[str, Any]] = []
    for site in (*block.sites, *(Site(name, "none", "", (name,)) for name in alone)):
        names = [name for name in site.consumers if name in situation.linears]
        if not names:
            continue
        search = _ScaleSearch(situation, observed, site, names, config.search_tokens)
        if search.tokens < FEWEST_ROWS:
            situation.note(f"awq leaves inputs alone that fewer than {FEWEST_ROWS} calibration tokens reach.")
            continue
        before, best = search.run(config.steps)
        s = search.scale(best)
        fact = {"linear" if site.name in alone else "site": site.name, "loss_before": before, "loss": best.loss}
        fact |= {"r": best.r, "form": "duo" if best.duo else "plain"}
        facts.append(fact | {"scale_min": float(s.min()), "scale_max": float(s.max())})
        if not best.identity:
            scales[site.name] = s
    limits, clips = weight_limits(situation, observed, scales) if config.clip else ({}, [])
    inverse = {name: s.double().reciprocal() for name, s in scales.items()}
    return Solution(
        sites={name: SiteChange(scale=t) for name, t in inverse.items() if name not in alone},
        linears={name: t for name, t in inverse.items() if name in alone},
        limits=limits,
        facts=facts + clips,
    )


# --- scales ----------------------------------------------------------------------------------------------------------


def candidate_scale(act: Tensor, weight: Tensor, r: float, duo: bool) -> Tensor:
    """s [width] from mean|x| and b, float32 [width]; geometric mean of smallest and largest 1.

    A channel that is zero on either side has nothing to win: s = 1.
    """
    live = (act > 0) & (weight > 0)
    s = act.double().pow(r)
    if duo:
        s = s / (weight.double().pow(1 - r) + _EPS)
    if not live.any():
        return torch.ones_like(act)
    s = s / (s[live].amin().sqrt() * s[live].amax().sqrt())
    return torch.where(live, s.clamp(1 / _LARGEST, _LARGEST), 1.0).float()


def tied(site: Site, columns: Tensor) -> Tensor:
    """``columns``, a value per input column of the consumers, as one per signal channel: the mean of the heads that
    read it. [columns] -> [signal width]."""
    if site.repeats == 1:
        return columns
    return columns.unflatten(0, (-1, site.repeats, site.head_dim)).mean(1).flatten()


def weight_share(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over all rows of ``weights`` [rows, columns] each of |W| / max|W| of its group; [columns]."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64)
    for weight in weights:

        def add(chunk: slice, weight: Tensor = weight) -> Tensor:
            parts = []
            for part in group_views(weight[chunk].abs(), group_size):
                largest = part.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).smallest_normal)
                parts.append((part / largest).sum(0, dtype=torch.float64).flatten())
            return torch.cat(parts)

        total += torch.stack(by_rows(add, *weight.shape)).sum(0)
    return (total / sum(len(weight) for weight in weights)).float()


class _ScaleSearch:
    """The scale of one signal."""

    def __init__(self, situation: Situation, observed: Observed, site: Site, names: Sequence[str], tokens: int) -> None:
        self._situation, self._site, self._names = situation, site, names
        weights = [situation.block.weight(name) for name in names]
        self._act = tied(site, observed.statistics.of_site(site).absmean)
        self._weight = tied(site, weight_share(weights, situation.weights_of(names[0]).group_size))
        self._replay = observed.replay(site, tokens)
        self.tokens = min(self._replay.tokens, len(observed.statistics.of_site(site).rows))
        """What there is to judge by: calibration tokens, or fewer sampled rows."""

    def scale(self, choice: Choice) -> Tensor:
        """s of the signal; exactly 1 for the identity."""
        if choice.identity:
            return torch.ones_like(self._act)
        return candidate_scale(self._act, self._weight, choice.r, choice.duo)

    def run(self, steps: int) -> tuple[float, Choice]:
        """(loss as it is, the best)."""
        grid = [step / steps for step in range(steps + 1)]
        before = self._judge(0.0, duo=False)
        found = [before, *(self._judge(r, duo=False) for r in grid[1:]), *(self._judge(r, duo=True) for r in grid[:-1])]
        best = min(found)
        centre, reach = round(best.r * _FINE), -(-_FINE // steps) - 1
        near = [step for step in range(max(centre - reach, 0), min(centre + reach, _FINE) + 1) if step != centre]
        return before.loss, min([best, *(self._judge(step / _FINE, best.duo) for step in near)])

    def _judge(self, r: float, duo: bool) -> Choice:
        columns = consumer_columns(self._site, self.scale(Choice(0.0, r, duo)))
        block, activations = self._situation.block, self._situation.scheme.activations

        def change(x: Tensor) -> Tensor:
            return changed_input(x, columns, activations)

        substitutes = {}
        for name in self._names:
            weight = self._situation.rounded(name, block.weight(name) * columns)
            substitutes[name] = Substitute(weight, block.tensors.get(f"{name}.bias"), change)
        return Choice(self._replay.error(substitutes), r, duo)


def changed_input(x: Tensor, s: Tensor, activations: ActivationScheme | None) -> Tensor:
    """``x`` [..., columns] / s [columns], rounded as at run time."""
    return x / s if activations is None else fake_quantize(x / s, activations)


# --- limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Of the weights of one linear, per row and group."""

    low: Tensor
    """[rows, groups]; -inf: nothing is cut off."""
    high: Tensor
    """[rows, groups]; inf: nothing is cut off."""
    loss_before: float
    """Sum over rows and groups of the squared error of their part of the output, over that of the parts' squares."""
    loss: float

    @property
    def share(self) -> float:
        """Of groups that are clipped."""
        return float((self.low.isfinite() | self.high.isfinite()).float().mean())


def weight_limits(
    situation: Situation, observed: Observed, scales: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[dict[str, Any]]]:
    """Limits of the linears that have inputs to judge them by, where ``rtn`` follows, and what to record.

    Args:
        scales: site, or linear that has a scale of its own -> s. The limits are those of the scaled weights.
    """
    block, limits, facts = situation.block, {}, []
    skipped = _attention_scores(block.sites)
    for name in situation.linears if situation.rounding == "rtn" else ():
        rows = observed.statistics.inputs[name].rows
        if name in skipped or len(rows) < FEWEST_ROWS:
            continue
        columns = _columns_of(block, name, scales)
        inputs = changed_input(rows, columns, situation.scheme.activations)
        weight = block.weight(name) * columns * _rows_of(block, name, scales)[:, None]

        def rounded(part: Tensor, name: str = name) -> Tensor:
            return situation.rounded(name, part)

        found = find_limits(weight, inputs, situation.weights_of(name), rounded)
        fact = {"linear": name, "clip_loss_before": found.loss_before, "clip_loss": found.loss}
        facts.append({**fact, "clipped": found.share})
        if found.share:
            limits[name] = found.low, found.high
    return limits, facts


def _attention_scores(sites: Iterable[Site]) -> set[str]:
    """Linears that make queries and keys, also fused ones: scores are products of two outputs, and what is cut off one
    row of weights changes them more than an error of the output tells."""
    values = {site.producer for site in sites if site.head_dim and site.rows is None}
    return {name for site in sites if site.name == "attention.input" for name in site.consumers} - values


def _columns_of(block: Block, name: str, scales: Mapping[str, Tensor]) -> Tensor:
    """What the columns of a linear are multiplied by, [in_features] or [1]."""
    for site in block.sites:
        if name in site.consumers and site.name in scales:
            return consumer_columns(site, scales[site.name])
    return scales.get(name, torch.ones(1))


def _rows_of(block: Block, name: str, scales: Mapping[str, Tensor]) -> Tensor:
    """What the rows of a linear are multiplied by because they make a signal that is scaled, [out_features]."""
    factor = torch.ones(len(block.weight(name)))
    for site in block.sites:
        if site.kind == "linear" and site.producer == name and site.name in scales:
            factor[slice(None) if site.rows is None else site.rows] = scales[site.name].reciprocal()
    return factor


@serial_operations()
def find_limits(weight: Tensor, inputs: Tensor, scheme: WeightScheme, rounded: Callable[[Tensor], Tensor]) -> Limits:
    """Search the limits of every row and group of ``weight`` float32 [rows, columns].

    Shares 1, 0.95 .. 0.5 of the range are tried; with a zero point first of both ends, then of the lower, then of the
    upper end. The error is sum over tokens of (x_g . (rounded(w_g, clamped) - w_g))**2: never worse than unclipped.

    Args:
        inputs: [tokens, columns] float32, what the weights are multiplied by.
        rounded: rows of the weight [n, columns] as they are rounded.
    """
    # ||X d|| = ||R d|| with the triangular factor of X: as many rows as a group is wide, however many tokens.
    parts = group_views(inputs, scheme.group_size)
    roots = [torch.linalg.qr(part.transpose(0, 1), mode="r").R for part in parts]  # [groups, m, width]
    phases = [(True, True)] if scheme.is_symmetric else [(True, True), (True, False), (False, True)]

    def search(chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        part = weight[chunk]
        ends = _ends(part, scheme)  # [2, rows, groups]
        first = least = _group_errors(rounded(part) - part, roots, scheme.group_size)
        best = torch.ones_like(ends)
        for phase in phases:
            moved = torch.tensor(phase)[:, None, None]
            base = best
            for share in _SHARES:
                tried = torch.where(moved, share, base)
                error = _group_errors(rounded(_clamped(part, ends * tried, scheme)) - part, roots, scheme.group_size)
                best = torch.where(error < least, tried, best)
                least = torch.minimum(error, least)
        sizes = _group_errors(part, roots, scheme.group_size)
        sums = torch.stack([errors.sum(dtype=torch.float64) for errors in (first, least, sizes)])
        return *(ends * best).where(best < 1, torch.tensor([-torch.inf, torch.inf])[:, None, None]), sums

    low, high, sums = zip(*by_rows(search, *weight.shape), strict=True)
    before, after, size = torch.stack(sums).sum(0).tolist()
    return Limits(torch.cat(low), torch.cat(high), before / size if size else 0.0, after / size if size else 0.0)


def _ends(part: Tensor, scheme: WeightScheme) -> Tensor:
    """Ends [2, rows, groups] of the range that rounding covers: beyond them there is nothing to cut off.

    With a zero point those of the weights and 0; symmetric ones as far as the levels reach on either side.
    """
    views = group_views(part, scheme.group_size)
    low = torch.cat([view.amin(-1) for view in views], dim=1).clamp_(max=0)
    high = torch.cat([view.amax(-1) for view in views], dim=1).clamp_(min=0)
    if not scheme.is_symmetric:
        return torch.stack((low, high))
    half = 2 ** (scheme.bits - 1)
    below, above = (1.0, 1.0) if scheme.levels == "nf4" else (half + 0.5, half - 0.5)
    scale = torch.maximum(low / -below, high / above)
    return torch.stack((scale * -below, scale * above))


def _clamped(part: Tensor, ends: Tensor, scheme: WeightScheme) -> Tensor:
    """``part`` [rows, columns] between ``ends`` [2, rows, groups]."""
    columns = part.shape[1]
    width = columns if scheme.group_size == PER_CHANNEL else scheme.group_size
    low, high = ends.repeat_interleave(width, dim=2)[..., :columns]
    return part.clamp(low, high)


def _group_errors(change: Tensor, roots: Sequence[Tensor], group_size: int) -> Tensor:
    """||R_g d_g||**2 [rows, groups] for every row and group of ``change`` [rows, columns]."""
    errors = []
    for part, root in zip(group_views(change, group_size), roots, strict=True):
        product = torch.bmm(root, part.permute(1, 2, 0))  # [groups, m, rows]
        errors.append(product.square_().sum(1).t())
    return torch.cat(errors, dim=1)
