"""``--method`` and ``--scheme``: short names that expand to a full recipe, and flags that override one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit import registry
from quantkit.recipe import Recipe, Scheme, build_recipe, load_recipe

DEFAULT_METHOD = "sinq"
DEFAULT_SCHEME = "W4A16G64"
DEFAULT_ROUNDING = "rtn"


def expand(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    method: str | None = None,
    scheme: str | None = None,
    **flags: Any,
) -> Recipe:
    """One recipe out of what was given; ``method``, ``scheme`` and ``flags`` win over ``recipe``.

    Flags that are None leave the recipe's value. Without a recipe, method and scheme have defaults.

    Raises:
        RecipeError: anything invalid, with every problem and its place.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(Path(recipe))
    data = recipe.model_dump() if isinstance(recipe, Recipe) else dict(recipe or {})
    origin = "recipe" if data else "options"
    if method is not None or not data:
        data["steps"] = method_steps(method or DEFAULT_METHOD)
    if scheme is not None or not data.get("scheme"):
        data["scheme"] = Scheme.parse(scheme or DEFAULT_SCHEME)
    flags = {key: value for key, value in flags.items() if value is not None}
    if isinstance(flags.get("calibration"), Mapping) and isinstance(data.get("calibration"), Mapping):
        flags["calibration"] = {**data["calibration"], **flags["calibration"]}
    data |= flags
    return build_recipe(data, origin)


def method_steps(method: str) -> list[dict[str, Any]]:
    """``sinq`` -> [sinq, rtn]; ``a+b`` keeps its order; without a rounding, round to nearest comes before any tuning.

    Raises:
        RecipeError: an unknown name, with the nearest known one.
    """
    names = [name.strip() for name in method.split("+")]
    kinds = [registry.get(name).kind for name in names]
    if "rounding" not in kinds:
        names.insert(kinds.index("tuning") if "tuning" in kinds else len(names), DEFAULT_ROUNDING)
    return [{"method": name} for name in names]
