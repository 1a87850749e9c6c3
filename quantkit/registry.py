"""Every method: its name, where its code is, and what a user should know before choosing it.

To add a method: write one file with a ``Config`` and its function (``solve`` for a transform, ``quantize`` for a
rounding), then add one row here. Nothing is imported until a run asks for the name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from quantkit.errors import RecipeError, did_you_mean

Kind = Literal["transform", "rounding"]


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
    """What it wants to know of the inputs of linears (``calibrate/statistics.py``); none: it needs no data."""

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
        name="sinq",
        kind="transform",
        module="quantkit.transforms.sinq",
        summary="balance the spread of weight columns by Sinkhorn iteration before rounding",
        paper="Mueller et al., SINQ, arXiv 2509.22944",
        needs="nothing",
        loads_in=_PORTABLE,
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def get(name: str) -> Method:
    """The method called ``name``; a ``RecipeError`` names the nearest known one."""
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}'. {did_you_mean(name, METHODS)}")
    return METHODS[name]
