"""SINQ with activations (Mueller et al., arXiv 2509.22944, appendix): weight and input statistics share one scale.

    y = W @ x   becomes   y = (W / t) @ (x * t)        t = c**p / a**q        c: SINQ's column scale, a: mean|x|

With c_j the spread of column j and a_j that of its input, the expected error of the output of a group is

    E ~ (sum_j a_j**2 t_j**2) * (sum_j c_j**2 / t_j**2),   least for t_j = (c_j / a_j)**(1/2)

SINQ's t = c is that where a ~ 1/c, as in many trained layers; where it does not hold, other exponents are better. So
p and q are chosen per signal, by the error of the rounded linears' outputs on sampled inputs. SINQ (p = 1, q = 0) and
plain rounding (p = q = 0) are among the candidates. The published algorithm runs AWQ's grid of exponents on balanced
weights instead. Limits of the weights are AWQ's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.models.block import Site
from quantkit.quantizers.grid import by_rows, group_views
from quantkit.recipe import PER_CHANNEL
from quantkit.transforms import sinq
from quantkit.transforms.awq import FEWEST_ROWS, changed_input, tied, weight_limits
from quantkit.transforms.fold import consumer_columns
from quantkit.transforms.interface import Observed, Online, SiteChange, Situation, Solution

_EXPONENTS = [(p, q) for q in (0.0, 0.25, 0.5) for p in (1.0, 0.75, 0.5, 0.0)]
"""(p, q) in the order in which ties are decided: SINQ first, which is also what is left without enough inputs."""
_LARGEST = 1e3
"""Bounds of t; keeps inputs inside float16."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``asinq``."""

    sweeps: int = Field(4, ge=1, le=64, description="as in sinq")
    absorb: Literal["auto", "never"] = Field("auto", description="as in sinq")
    clip: bool = Field(True, description="search limits for the weights, too, as awq does; only before rtn")

    @property
    def balance(self) -> sinq.Config:
        """What SINQ is asked for."""
        return sinq.Config(sweeps=self.sweeps, absorb=self.absorb)


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    return sinq.online(sites, linears, config.balance)


def solve(situation: Situation, config: Config) -> Solution:
    """Column scales for the quantised linears of a block: as ``sinq`` one per site, or per linear where none can be
    folded."""
    observed, block = situation.observed, situation.block
    assert observed is not None
    per_linear = online(block.sites, situation.linears, config)
    scales: dict[str, Tensor] = {}  # site, or linear -> t
    facts: list[dict[str, Any]] = []
    for site in (*block.sites, *(Site(name, "none", "", (name,)) for name in per_linear)):
        alone = site.name in per_linear
        names = [name for name in site.consumers if name in situation.linears and (alone or name not in per_linear)]
        if names:
            t, fact = _best_scale(situation, observed, site, names, config)
            facts.append({"linear" if alone else "site": site.name, **fact})
            if bool((t != 1).any()):
                scales[site.name] = t
    inverse = {name: t.reciprocal() for name, t in scales.items()}
    limits, clips = weight_limits(situation, observed, inverse) if config.clip else ({}, [])
    return Solution(
        sites={name: SiteChange(scale=t) for name, t in scales.items() if name not in per_linear},
        linears={name: t for name, t in scales.items() if name in per_linear},
        limits=limits,
        facts=facts + clips,
    )


def _best_scale(
    situation: Situation, observed: Observed, site: Site, names: Sequence[str], config: Config
) -> tuple[Tensor, dict[str, Any]]:
    """t [signal width] of the signal that ``names`` read, and what to record."""
    group_size = situation.weights_of(names[0]).group_size
    weights = [situation.block.weight(name) for name in names]
    c = sinq.column_scale(weights, group_size, config.balance, site.repeats, site.head_dim)
    a = tied(site, observed.statistics.of_site(site).absmean)
    # A factor of a whole group goes into the group's scale; where groups cut through tied heads only one of all does.
    logs = c.log(), _centred_logs(a, PER_CHANNEL if site.repeats > 1 else group_size)
    candidates = [(p * logs[0] - q * logs[1]).exp().clamp(1 / _LARGEST, _LARGEST) for p, q in _EXPONENTS]
    losses = _output_errors(situation, observed, names, [consumer_columns(site, t) for t in candidates])
    best = losses.index(min(losses))
    t, (p, q) = candidates[best], _EXPONENTS[best]
    fact = {"loss_before": losses[_EXPONENTS.index((0.0, 0.0))], "loss_sinq": losses[0], "loss": losses[best]}
    return t, fact | {"p": p, "q": q, "scale_min": float(t.min()), "scale_max": float(t.max())}


def _centred_logs(a: Tensor, group_size: int) -> Tensor:
    """log a [columns] without its mean in each group, over the channels that are ever active; 0 at the others."""
    live = a > 0
    logs = torch.where(live, a, 1.0).log()
    for values, alive in zip(group_views(logs[None], group_size), group_views(live[None], group_size), strict=True):
        values.sub_(values.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)).mul_(alive)
    return logs


def _output_errors(
    situation: Situation, observed: Observed, names: Sequence[str], candidates: Sequence[Tensor]
) -> list[float]:
    """Squared error of the outputs of ``names`` over all tokens, over their squares, for every t [columns].

    Estimated on the sampled rows of each linear's own input: an expert counts for the tokens that it sees.
    """
    size, errors = 0.0, [0.0] * len(candidates)
    for name in names:
        seen, weight = observed.statistics.inputs[name], situation.block.weight(name)
        rows = seen.rows
        if len(rows) < FEWEST_ROWS:
            continue
        share = seen.tokens / len(rows)
        expected = _product(rows, weight, lambda part: part)
        size += share * float(expected.square().sum(dtype=torch.float64))
        for number, t in enumerate(candidates):
            inputs = changed_input(rows, t.reciprocal(), situation.scheme.activations)

            def rounded(part: Tensor, name: str = name, t: Tensor = t) -> Tensor:
                return situation.rounded(name, part / t)

            change = _product(inputs, weight, rounded).sub_(expected)
            errors[number] += share * float(change.square_().sum(dtype=torch.float64))
    return [error / size if size else 0.0 for error in errors]


def _product(inputs: Tensor, weight: Tensor, changed: Callable[[Tensor], Tensor]) -> Tensor:
    """``inputs`` [tokens, columns] @ ``changed(weight)``.T, where ``weight`` [rows, columns] is changed row by row."""
    return torch.cat(by_rows(lambda chunk: inputs @ changed(weight[chunk]).t(), *weight.shape), dim=1)
