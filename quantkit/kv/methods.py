"""Every way to keep keys and values in the cache: its names, where its code is, what a user should know of it.

To add one: write a file with a ``Config``, which has ``describe()``, and ``layer_kv(config, facts)``
(``interface.py``), then add a row here. Nothing is imported until a cache asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from quantkit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from quantkit.kv.interface import LayerFacts, LayerKV

NONE = "none"
"""The name for keys and values in full precision."""


@runtime_checkable
class Presets(Protocol):
    """Settings of which some are decided by another one."""

    def settled(self) -> BaseModel:
        """The same with nothing left to decide."""


@dataclass(frozen=True)
class CacheMethod:
    """One row of the caches in ``quantkit methods``."""

    name: str
    module: str
    """With ``Config`` and ``layer_kv``, unless ``config`` and ``make`` say otherwise."""
    summary: str
    paper: str
    bits: str
    """Per element of keys and values; d: head_dim."""
    short: Mapping[str, Mapping[str, Any]]
    """Names with the settings in them: of ``--kv``."""
    by_token: bool
    """Each token is kept by itself, so tokens that leave a sliding window can go; a method that needs several of them
    leaves layers with such a window to transformers."""
    config: str = "Config"
    make: Callable[[Any, LayerFacts], LayerKV] | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings that are a name among these or, in a request of the user's own, the path of a file."""

    def settings(self) -> type[BaseModel]:
        """What can be set."""
        kind: type[BaseModel] = getattr(importlib.import_module(self.module), self.config)
        return kind

    def layer_kv(self, config: BaseModel, facts: LayerFacts) -> LayerKV:
        """How a layer keeps its keys and values."""
        make: Callable[[Any, LayerFacts], LayerKV] = self.make or importlib.import_module(self.module).layer_kv
        return make(config, facts)

    def check_no_file(self, config: BaseModel) -> None:
        """What is stored with a model names no file of a machine: that would be read wherever the model is loaded.

        Raises:
            RecipeError: a setting is a path; names it.
        """
        for setting, known in self.files.items():
            value = getattr(config, setting)
            if value is not None and value not in known:
                raise RecipeError(
                    f"cache method '{self.name}': {setting} is '{value}', but what is stored with a model may not name "
                    f"a file; use one of {', '.join(known)}."
                )


def _nsnquant(config: Any, facts: LayerFacts) -> LayerKV:
    from quantkit.kv.nsnquant import layer_kv
    from quantkit.kv.rope import rope_of

    rope = None if facts.config is None else rope_of(facts.config, facts.layer)
    return layer_kv(config, facts.key_dim, facts.value_dim, rope)


MINMAX = "minmax"

_ROWS = (
    CacheMethod(
        name=MINMAX,
        module="quantkit.recipe",
        config="KVScheme",
        summary="evenly spaced codes for each token and head, keys rotated up to 4 bits; KV2 .. KV8 of a scheme",
        paper="Sun et al., FlatQuant, arXiv 2410.09426, section 4.1",
        bits="b + 24 / d (b + 16 / d if symmetric)",
        short={f"kv{bits}": {"bits": bits} for bits in range(2, 9)} | {"int8": {"bits": 8, "symmetric": True}},
        by_token=True,
    ),
    CacheMethod(
        name="rotation",
        module="quantkit.kv.rotation_scalar",
        summary="random rotation of each key and value, then the best scalar levels for normal numbers",
        paper="Zandieh et al., TurboQuant, arXiv 2504.19874",
        bits="b + 16 / d",
        short={f"rotation-{bits}bit": {"bits": bits} for bits in (1, 2, 3, 4)},
        by_token=True,
    ),
    CacheMethod(
        name="kivi",
        module="quantkit.kv.kivi",
        summary="keys per channel over groups of tokens, values per token over groups of channels, newest tokens as "
        "they are",
        paper="Liu et al., KIVI, arXiv 2402.02750",
        bits="b + 32 / group_size, 16 for the newest residual tokens",
        short={f"kivi-{bits}bit": {"bits": bits} for bits in (2, 4)},
        by_token=False,
    ),
    CacheMethod(
        name="nsnquant",
        module="quantkit.kv.nsnquant",
        make=_nsnquant,
        summary="tokens normalised, shifted by the mean of their chunk and rotated, then codewords of eight numbers",
        paper="Son et al., NSNQuant, arXiv 2505.18231",
        bits="b + 0.24 at d = 128, 16 for the first and the newest tokens",
        short={f"nsnquant-{bits}bit": {"bits": bits} for bits in (1, 2)},
        by_token=False,
        files={"codebook": ("e8", "kmeans"), "magnitudes": ("magnitudes",)},
    ),
)

CACHE_METHODS: dict[str, CacheMethod] = {row.name: row for row in _ROWS}


def get(name: str) -> CacheMethod:
    """The method called ``name``; a ``RecipeError`` names the nearest known one."""
    if name not in CACHE_METHODS:
        raise RecipeError(f"unknown cache method '{name}'. {did_you_mean(name, [*CACHE_METHODS, *short_names()])}")
    return CACHE_METHODS[name]


def short_names() -> list[str]:
    """Every name that says all there is to say, ``none`` included."""
    return [*(name for row in _ROWS for name in row.short), NONE]


def request(name: str, settings: Mapping[str, Any] | None = None) -> tuple[CacheMethod, BaseModel]:
    """The method that ``name`` (``kivi``, ``kivi-2bit``, ``int8``; any case) names, and its settings, checked.

    Args:
        settings: come on top of those in the name.

    Raises:
        RecipeError: no such method or setting, with the nearest known one, or a value that a setting cannot have.
    """
    wanted = name.strip().lower()
    if wanted == NONE:
        raise RecipeError(f"'{NONE}' leaves keys and values as they are: it has no settings.")
    row = next((row for row in _ROWS if wanted in row.short), None) or get(wanted)
    given = {**row.short.get(wanted, {}), **(settings or {})}
    kind = row.settings()
    try:
        config = kind.model_validate(given)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            key = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                problems.append(f"'{key}' is not a setting. {did_you_mean(key, kind.model_fields)}")
            else:
                problems.append(f"{key} is {problem['input']!r}: {message}" if key else message)
        raise RecipeError(f"cache method '{row.name}': " + "; ".join(problems)) from None
    # What a preset stands for may change one day, what was stored with a model may not.
    return row, config.settled() if isinstance(config, Presets) else config
