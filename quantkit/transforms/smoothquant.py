"""SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4): move activation outliers into the weights.

    y = W @ norm(x)   becomes   y = (W * s) @ (norm(x) / s)        s_j = max|x_j|**alpha / max|W_j|**(1 - alpha)

The maximum of W_j is over the rows of every linear that reads the norm. 1/s is folded into the norm, so nothing is left
to do at inference. A channel that is zero on either side has no outlier to move: it keeps s = 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.calibrate.replay import Substitute
from quantkit.kernels.reference import fake_quantize
from quantkit.models.block import Site
from quantkit.transforms.interface import Observed, Online, SiteChange, Situation, Solution, online_sites

_ALPHAS = tuple(round(0.4 + 0.05 * step, 2) for step in range(12))


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``smoothquant``."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        0.5,
        description="share of the outliers that moves into the weights: 0.8 to 0.9 suits many newer models; search: "
        "per site the best of 0.40, 0.45 .. 0.95 by the error of the quantised output",
    )
    search_tokens: int = Field(2048, ge=1, description="alpha search: calibration tokens that judge a candidate")


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    return online_sites(sites, linears, {"scale"})


def solve(situation: Situation, config: Config) -> Solution:
    """One scale per norm of a block; as in the paper, inputs that no norm makes are left alone."""
    observed = situation.observed
    assert observed is not None
    changes, facts = {}, []
    for site in situation.block.sites:
        names = [name for name in site.consumers if name in situation.linears]
        if site.kind == "linear" or not names:
            continue
        act = observed.statistics.of_site(site).absmax
        weight = torch.stack([situation.block.weight(name).abs().amax(dim=0) for name in names]).amax(dim=0)
        fact: dict[str, Any] = {"site": site.name}
        if config.alpha == "search":
            alpha, fact["loss_before"], fact["loss"] = _search(situation, observed, site, names, act, weight, config)
        else:
            alpha = config.alpha
        s = smoothing_scale(act, weight, alpha) if alpha is not None else torch.ones_like(act)
        changes[site.name] = SiteChange(scale=s.double().reciprocal())
        facts.append({**fact, "alpha": alpha, "scale_min": float(s.min()), "scale_max": float(s.max())})
    return Solution(changes, facts=facts)


def smoothing_scale(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s = act**alpha / weight**(1 - alpha); arguments and result are [in_features], float32."""
    s = act_absmax.pow(alpha) / weight_absmax.pow(1 - alpha)
    return torch.where((act_absmax > 0) & (weight_absmax > 0), s, 1.0)


def _search(
    situation: Situation,
    observed: Observed,
    site: Site,
    names: Sequence[str],
    act: Tensor,
    weight: Tensor,
    config: Config,
) -> tuple[float | None, float, float]:
    """(best alpha, loss without a scale, best loss); None: no scale is best."""
    replay = observed.replay(site, config.search_tokens)

    def loss(alpha: float | None) -> float:
        s = torch.ones_like(act) if alpha is None else smoothing_scale(act, weight, alpha)
        activations = situation.scheme.activations

        def change(x: Tensor) -> Tensor:
            return x / s if activations is None else fake_quantize(x / s, activations)

        def substitute(name: str) -> Substitute:
            bias = situation.block.tensors.get(f"{name}.bias")
            return Substitute(situation.rounded(name, situation.block.weight(name) * s), bias, change)

        return replay.error({name: substitute(name) for name in names})

    before = loss(None)
    losses = {alpha: loss(alpha) for alpha in _ALPHAS}
    best = min(losses, key=lambda alpha: losses[alpha])
    return (best, before, losses[best]) if losses[best] < before else (None, before, before)
