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

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


_PORTABLE = "transformers, vLLM (symmetric 2/4/8 bits); quantkit otherwise"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("rtn", "rounding", "quantkit.quantizers.rtn", "round to nearest; min/max or MSE-searched range; uniform or NF4",
               "Dettmers et al., QLoRA, arXiv 2305.14314 (NF4)", "nothing", _PORTABLE),
        Method("sinq", "transform", "quantkit.transforms.sinq", "balance column spread by Sinkhorn iteration, then round",
               "Mueller et al., SINQ, arXiv 2509.22944", "nothing", _PORTABLE),
    )
}  # fmt: skip


def get(name: str) -> Method:
    """The method called ``name``; a ``RecipeError`` names the nearest known one."""
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}'. {did_you_mean(name, METHODS)}")
    return METHODS[name]
