"""Every method: its name, where its code is, and what a user should know before choosing it.

To add a method: write one file with a ``Config`` and its function (``solve`` for a transform, ``quantize`` for a
rounding, ``tune`` for what comes behind it), then add one row here. Nothing is imported until a run asks for the name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from quantkit.errors import RecipeError, did_you_mean

Kind = Literal["transform", "rounding", "tuning"]


@dataclass(frozen=True)
class Method:
    """One row of ``quantkit methods``."""

    name: str
    kind: Kind
    module: str
    summary: str
    paper: str
    needs: str
    loads_in: str
    statistics: tuple[str, ...] = ()
    """What it wants to know of the inputs of linears (``calibrate/statistics.py``). A module that wants more or less
    for some options says so in ``statistics(config)``."""
    data: bool = False
    """It looks at calibration data beyond ``statistics``."""

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


_PORTABLE = "transformers, vLLM (symmetric 2/4/8 bits); quantkit otherwise"

_ROWS = (
    Method(
        name="rtn",
        kind="rounding",
        module="quantkit.quantizers.rtn",
        summary="round to nearest; min/max or MSE-searched range; uniform or NF4 levels",
        paper="NF4: Dettmers et al., QLoRA, arXiv 2305.14314",
        needs="nothing",
        loads_in=_PORTABLE,
    ),
    Method(
        name="hqq",
        kind="rounding",
        module="quantkit.quantizers.hqq",
        summary="refit scales and zero points to the rounded weights",
        paper="Badri and Shaji, HQQ, 2023",
        needs="nothing",
        loads_in=_PORTABLE,
    ),
    Method(
        name="gptq",
        kind="rounding",
        module="quantkit.quantizers.gptq",
        summary="round column by column, later columns make up for the errors",
        paper="Frantar et al., GPTQ, arXiv 2210.17323",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("hessian",),
    ),
    Method(
        name="smoothquant",
        kind="transform",
        module="quantkit.transforms.smoothquant",
        summary="move activation outliers into the weights by a fixed rule",
        paper="Xiao et al., SmoothQuant, arXiv 2211.10438",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("range",),
    ),
    Method(
        name="os-plus",
        kind="transform",
        module="quantkit.transforms.os_plus",
        summary="shift and scale activation outliers away, by a search on quantised outputs",
        paper="Wei et al., Outlier Suppression+, arXiv 2304.09145",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("range", "mean", "tokens", "rows"),
        data=True,
    ),
    Method(
        name="awq",
        kind="transform",
        module="quantkit.transforms.awq",
        summary="scale up the weights that meet large activations, clip the others, by a search on quantised outputs",
        paper="Lin et al., AWQ, arXiv 2306.00978",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("mean", "rows"),
        data=True,
    ),
    Method(
        name="sinq",
        kind="transform",
        module="quantkit.transforms.sinq",
        summary="balance the spread of weight columns by Sinkhorn iteration before rounding",
        paper="Mueller et al., SINQ, arXiv 2509.22944",
        needs="nothing",
        loads_in=_PORTABLE,
    ),
    Method(
        name="asinq",
        kind="transform",
        module="quantkit.transforms.asinq",
        summary="SINQ's column scales blended with activation scales, by a search on quantised outputs",
        paper="Mueller et al., SINQ, arXiv 2509.22944, appendix",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("mean", "rows"),
    ),
    Method(
        name="hadamard",
        kind="transform",
        module="quantkit.transforms.hadamard",
        summary="rotate the residual stream and inputs by random-sign Hadamard matrices: no outlier is left; part "
        "of it runs at inference",
        paper="Ashkboos et al., QuaRot, arXiv 2404.00456",
        needs="nothing",
        loads_in="quantkit",
    ),
    Method(
        name="omniquant",
        kind="transform",
        module="quantkit.transforms.omniquant",
        summary="learn limits of weights, scales and shifts of signals block by block, by gradient descent",
        paper="Shao et al., OmniQuant, arXiv 2308.13137",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("range", "rows"),
        data=True,
    ),
    Method(
        name="affinequant",
        kind="transform",
        module="quantkit.transforms.affinequant",
        summary="omniquant, and matrices that mix the channels of values within heads (of inputs, if asked, at a cost)",
        paper="Ma et al., AffineQuant, arXiv 2403.12544",
        needs="calibration data",
        loads_in=_PORTABLE,
        statistics=("range", "rows"),
        data=True,
    ),
    Method(
        name="flatquant",
        kind="transform",
        module="quantkit.transforms.flatquant",
        summary="learn matrices and scales that make inputs and weights flat, and limits of both; runs at inference",
        paper="Sun et al., FlatQuant, arXiv 2410.09426",
        needs="calibration data",
        loads_in="quantkit",
        statistics=("range", "rows"),
        data=True,
    ),
    Method(
        name="norm-tweaking",
        kind="tuning",
        module="quantkit.tuning.norm_tweaking",
        summary="tune the norms of a quantised block until its output is distributed as the float block's",
        paper="Li et al., Norm Tweaking, arXiv 2309.02784",
        needs="calibration data",
        loads_in=_PORTABLE,
        data=True,
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def get(name: str) -> Method:
    """The method called ``name``; a ``RecipeError`` names the nearest known one."""
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}'. {did_you_mean(name, METHODS)}")
    return METHODS[name]
