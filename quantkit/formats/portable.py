"""The ``quantization_config`` block of compressed-tensors: what it can hold, how we write it, how we read it.

We write as few keys as possible, because readers reject keys they do not know, and ``quantization_status`` always:
without it transformers loads random weights and says nothing. Which results its readers accept was measured with
transformers 5.23 and compressed-tensors 0.15 to 0.20.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from quantkit.errors import QuantkitError
from quantkit.formats.layer import LayerFormat
from quantkit.formats.matching import REGEX, LayerFormats, compact
from quantkit.recipe import PER_CHANNEL, ActivationScheme, WeightScheme

PORTABLE_METHOD = "compressed-tensors"
LOWEST_VERSION = "0.15.0"
"""The oldest compressed-tensors that transformers 5 accepts; it reads everything ``portable_config`` writes."""

_PORTABLE_BITS = (2, 4, 8)
_LINEAR = "Linear"
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")


def portable_reason(formats: Mapping[str, LayerFormat], shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why a compressed-tensors checkpoint cannot hold this result, in one sentence; None: it can.

    Args:
        formats: module name -> format, quantised linears only.
        shapes: module name -> (out_features, in_features) of every linear of the blocks.
    """
    for name, layer in formats.items():
        obstacle = _obstacle(layer, shapes[name][1])
        if obstacle:
            return f"{name} {obstacle}."
    return _experts_reason(formats, shapes)


def _obstacle(layer: LayerFormat, in_features: int) -> str | None:
    weights = layer.weights
    if weights.levels != "uniform":
        return f"is stored in {weights.levels} levels, which have no compressed-tensors form"
    if layer.input_scale:
        return "multiplies its input by a stored vector, which has no compressed-tensors form"
    if layer.input_shift:
        return "adds a stored vector to its input, which has no compressed-tensors form"
    if layer.input_op != "none":
        return f"multiplies its input by a matrix ({layer.input_op}), which only quantkit's format holds"
    if layer.input_clip:
        return "cuts off a stored share of its input's range, which only quantkit's format holds"
    if weights.bits not in _PORTABLE_BITS:
        return f"has {weights.bits}-bit codes, and versions of compressed-tensors differ on all but 2, 4 and 8 bits"
    if not weights.symmetric:
        return "has zero points, which compressed-tensors 0.18 and later fail to load"
    if weights.group_size != PER_CHANNEL and in_features % weights.group_size:
        return f"has {in_features} input columns, no multiple of the group size {weights.group_size}"
    return _activations_obstacle(layer)


def _activations_obstacle(layer: LayerFormat) -> str | None:
    activations = layer.activations
    if activations is None:
        return None
    if activations.granularity == "group":
        return "quantises activations in groups of channels, which vLLM does not run"
    if not activations.dynamic:
        if layer.storage != "int8" or layer.weights.group_size != PER_CHANNEL or activations.bits != 8:
            return "has static activation scales, which vLLM runs only with 8-bit weights per channel (W8A8TS)"
        return None
    if activations.granularity == "tensor":
        return "quantises activations dynamically per tensor, which vLLM does not run"
    if not activations.symmetric:
        return "quantises activations with a zero point, which vLLM does not run dynamically"
    return None


def _experts_reason(formats: Mapping[str, LayerFormat], shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """transformers merges the experts into one parameter while loading, by one scheme for the whole model."""
    experts = [name for name in shapes if _EXPERT.fullmatch(name)]
    used = {formats.get(name) for name in experts}
    if not used:
        return None
    if len(used) > 1:
        odd = next(name for name in experts if formats.get(name) != formats.get(experts[0]))
        return f"{odd} is stored differently from {experts[0]}, and transformers loads all experts by one scheme."
    layer = used.pop()
    if layer is None:
        return f"{experts[0]} stays in full precision, and transformers loads experts only quantised like the rest."
    if layer.activations is not None:
        return f"{experts[0]} has quantised activations, which transformers leaves out for experts."
    return None


def portable_config(formats: Mapping[str, LayerFormat], ignore: Iterable[str]) -> dict[str, Any]:
    """The compressed-tensors block for ``formats`` (module name -> format), which ``portable_reason`` accepted.

    Args:
        ignore: exact names of *every* linear of the model that stays in full precision, ``lm_head`` included: a
            forgotten one is loaded as quantised, with random weights.
    """
    kept = list(ignore)
    by_format: dict[LayerFormat, list[str]] = defaultdict(list)
    for name, layer in formats.items():
        by_format[layer].append(name)
    # Readers of fused experts and of vLLM's merged layers look for the class target, so the most common format has it.
    # It comes last, for readers that take the first group that matches.
    order = sorted(by_format, key=lambda layer: len(by_format[layer]))
    groups = {}
    for number, layer in enumerate(order):
        others = [name for name, other in formats.items() if other != layer] + kept
        named = by_format[layer]
        if layer is order[-1]:
            # transformers looks for the experts' scheme among the expressions first, and else takes the first group.
            named = [name for name in named if _EXPERT.fullmatch(name)] if len(order) > 1 else []
        targets = compact(named, others) + ([_LINEAR] if layer is order[-1] else [])
        groups[f"group_{number}"] = _group(layer, targets)
    storages = {group["format"] for group in groups.values()}
    return {
        "quant_method": PORTABLE_METHOD,
        "format": storages.pop() if len(storages) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": LOWEST_VERSION,
        "ignore": kept,
        "config_groups": groups,
    }


def _group(layer: LayerFormat, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": layer.weights.bits, "type": "int", "symmetric": layer.weights.symmetric}
    if layer.weights.group_size == PER_CHANNEL:
        weights |= {"strategy": "channel", "dynamic": False}
    else:
        weights |= {"strategy": "group", "group_size": layer.weights.group_size, "dynamic": False}
    inputs = None
    if layer.activations:
        inputs = {
            "num_bits": layer.activations.bits,
            "type": "int",
            "symmetric": layer.activations.symmetric,
            "strategy": layer.activations.granularity,
            "dynamic": layer.activations.dynamic,
        }
    return {
        "targets": targets,
        "format": "int-quantized" if layer.storage == "int8" else "pack-quantized",
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def read_portable(block: Mapping[str, Any]) -> LayerFormats:
    """The formats in a compressed-tensors block, ours or another tool's.

    Raises:
        QuantkitError: something in it changes the result and is nothing quantkit runs; names the key.
    """
    status = block.get("quantization_status")
    if status != "compressed":
        raise _cannot_read("quantization_status", status, "'compressed'")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config"):
        value = block.get(key)
        # A dense sparsity_config is what older tools write for "no sparsity".
        if value and not (isinstance(value, Mapping) and value.get("format", "") == "dense"):
            raise _cannot_read(key, value, "null")
    exact: dict[str, LayerFormat] = {}
    expressions: list[tuple[re.Pattern[str], LayerFormat]] = []
    every_linear = None
    for group_name, group in block.get("config_groups", {}).items():
        where = f"config_groups.{group_name}"
        if not isinstance(group, Mapping):
            raise _cannot_read(where, group, "a mapping with targets and weights")
        layer = _read_group(group, str(group.get("format") or block.get("format")), where)
        for target in group.get("targets", ()):
            if target == _LINEAR:
                every_linear = every_linear or layer
            elif target.startswith(REGEX):
                expressions.append((_prefix_expression(target), layer))
            else:
                exact.setdefault(target, layer)
    ignore = block.get("ignore") or ()
    return LayerFormats(
        exact=exact,
        expressions=tuple(expressions),
        every_linear=every_linear,
        ignored=frozenset(name for name in ignore if not name.startswith(REGEX)),
        ignored_expressions=tuple(_prefix_expression(name) for name in ignore if name.startswith(REGEX)),
    )


def _prefix_expression(pattern: str) -> re.Pattern[str]:
    """compressed-tensors matches the start of a name, ``LayerFormats`` a whole one."""
    return re.compile(f"(?:{pattern.removeprefix(REGEX)}).*")


def _read_group(group: Mapping[str, Any], storage: str, where: str) -> LayerFormat:
    if storage not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise _cannot_read(f"{where}.format", storage, "pack-quantized, int-quantized or naive-quantized")
    if group.get("output_activations"):
        raise _cannot_read(f"{where}.output_activations", group["output_activations"], "null")
    weights = _read_weights(group.get("weights") or {}, f"{where}.weights")
    if storage != "pack-quantized" and (weights.bits != 8 or not weights.symmetric):
        raise _cannot_read(f"{where}.format", storage, "pack-quantized unless the weights are symmetric with 8 bits")
    return LayerFormat(
        weights=weights,
        activations=_read_activations(group.get("input_activations"), f"{where}.input_activations"),
        input_scale=False,
        storage="packed" if storage == "pack-quantized" else "int8",
    )


def _read_weights(weights: Mapping[str, Any], where: str) -> WeightScheme:
    if weights.get("type", "int") != "int":
        raise _cannot_read(f"{where}.type", weights["type"], "int")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _cannot_read(f"{where}.actorder", weights["actorder"], "null, weight or static")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or {None: "tensor", PER_CHANNEL: "channel"}.get(size, "group")
    if strategy not in ("group", "channel"):
        raise _cannot_read(f"{where}.strategy", strategy, "group or channel")
    try:
        return WeightScheme(
            bits=weights.get("num_bits", 8),
            symmetric=weights.get("symmetric", True),
            group_size=PER_CHANNEL if strategy == "channel" or size is None else size,
            levels="uniform",
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise _cannot_read(f"{where}.{problem['loc'][0]}", problem["input"], problem["msg"]) from None


def _read_activations(inputs: Mapping[str, Any] | None, where: str) -> ActivationScheme | None:
    if not inputs:
        return None
    if inputs.get("type", "int") != "int":
        raise _cannot_read(f"{where}.type", inputs["type"], "int")
    dynamic = inputs.get("dynamic", False)
    if not isinstance(dynamic, bool):
        raise _cannot_read(f"{where}.dynamic", dynamic, "true or false")
    strategy = inputs.get("strategy") or "tensor"
    allowed = ("token", "tensor") if dynamic else ("tensor",)
    if strategy not in allowed:
        raise _cannot_read(f"{where}.strategy", strategy, " or ".join(allowed))
    try:
        return ActivationScheme(
            bits=inputs.get("num_bits", 8),
            symmetric=inputs.get("symmetric", True),
            granularity="token" if strategy == "token" else "tensor",
            dynamic=dynamic,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise _cannot_read(f"{where}.{problem['loc'][0]}", problem["input"], problem["msg"]) from None


def _cannot_read(key: str, value: Any, allowed: str) -> QuantkitError:
    return QuantkitError(
        f"quantization_config.{key} is {value!r}; quantkit reads {allowed}: load this model with transformers or vLLM."
    )
