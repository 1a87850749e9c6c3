"""The ``quantization_config`` block of config.json: which linears are quantised, and how each is stored.

``native_config`` writes ours, ``portable_config`` (portable.py) that of compressed-tensors for results its readers
accept, and ``read_config`` reads both.

The native block:

    {"quant_method": "quantkit", "format_version": 1,
     "layers": [{"match": ["re:model\\.layers\\.\\d+\\.mlp\\.up_proj$", "an.exact.name"],
                 "weights": {"bits": 3, "symmetric": false, "group_size": 64, "levels": "uniform"},
                 "activations": null, "input_scale": true, "input_shift": false, "input_op": "none",
                 "input_left": null, "input_clip": false, "storage": "packed"}],
     "kv_cache": {"bits": 4, "symmetric": false, "clip": 1.0, "key_transform": "hadamard", "seed": 0,
                  "learned_clips": false},
     "ignore": ["lm_head"]}

``match`` holds module names of the transformers model. What no entry matches is stored as it was; ``ignore`` lists the
linears among that for the reader's benefit. ``kv_cache`` is there if keys and values are quantised (kv.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from quantkit.errors import QuantkitError
from quantkit.formats.kv import AnyKV, parse_kv
from quantkit.formats.layer import LayerFormat
from quantkit.formats.matching import REGEX, LayerFormats, compact
from quantkit.formats.portable import PORTABLE_METHOD, portable_config, portable_reason, read_portable

__all__ = [
    "NATIVE_METHOD",
    "PORTABLE_METHOD",
    "native_config",
    "portable_config",
    "portable_reason",
    "read_config",
    "read_kv",
]

NATIVE_METHOD = "quantkit"
FORMAT_VERSION = 1


def native_config(formats: Mapping[str, LayerFormat], ignore: Iterable[str], kv: AnyKV | None = None) -> dict[str, Any]:
    """The native block for ``formats`` (module name -> format).

    Args:
        ignore: exact names of the linears that stay in full precision.
        kv: how keys and values are kept; None: in full precision.
    """
    kept = list(ignore)
    by_format: dict[LayerFormat, list[str]] = defaultdict(list)
    for name, layer in formats.items():
        by_format[layer].append(name)
    layers = []
    for layer, names in by_format.items():
        others = [name for name, other in formats.items() if other != layer] + kept
        layers.append({"match": compact(names, others), **layer.model_dump(mode="json")})
    block = {"quant_method": NATIVE_METHOD, "format_version": FORMAT_VERSION, "layers": layers}
    return block | ({} if kv is None else {"kv_cache": kv.model_dump(mode="json")}) | {"ignore": kept}


def read_config(block: Mapping[str, Any]) -> LayerFormats:
    """The formats that a ``quantization_config`` block describes.

    Raises:
        QuantkitError: the block is of another method, or says something quantkit cannot run; names the key.
    """
    method = block.get("quant_method")
    if method == NATIVE_METHOD:
        return _read_native(block)
    if method == PORTABLE_METHOD:
        return read_portable(block)
    raise QuantkitError(
        f"quantization_config.quant_method is {method!r}; quantkit reads '{NATIVE_METHOD}' and '{PORTABLE_METHOD}': "
        "load this model with the tool that wrote it."
    )


def read_kv(block: Mapping[str, Any]) -> AnyKV | None:
    """How a native ``quantization_config`` block says that keys and values are kept; None: in full precision.

    Raises:
        QuantkitError: it says something quantkit cannot run; names the key.
    """
    entry = block.get("kv_cache") if block.get("quant_method") == NATIVE_METHOD else None
    if entry is None:
        return None
    try:
        return parse_kv(entry)
    except ValidationError as error:
        raise _damaged(error, "quantization_config.kv_cache") from None


def _damaged(error: ValidationError, where: str) -> QuantkitError:
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in (where, *problem["loc"]))
    return QuantkitError(
        f"{place}: {problem['msg'].removeprefix('Value error, ')}; the checkpoint was changed or is damaged."
    )


def _read_native(block: Mapping[str, Any]) -> LayerFormats:
    version = block.get("format_version")
    if version != FORMAT_VERSION:
        raise QuantkitError(
            f"quantization_config.format_version is {version!r}; this quantkit reads {FORMAT_VERSION}: "
            "use the version of quantkit that wrote the checkpoint."
        )
    exact: dict[str, LayerFormat] = {}
    expressions: list[tuple[re.Pattern[str], LayerFormat]] = []
    for number, entry in enumerate(block.get("layers", ())):
        where = f"quantization_config.layers.{number}"
        try:
            layer = LayerFormat.model_validate({key: value for key, value in entry.items() if key != "match"})
        except ValidationError as error:
            raise _damaged(error, where) from None
        for pattern in entry.get("match", ()):
            if pattern.startswith(REGEX):
                expressions.append((re.compile(pattern.removeprefix(REGEX)), layer))
            else:
                exact[pattern] = layer
    return LayerFormats(exact=exact, expressions=tuple(expressions))
