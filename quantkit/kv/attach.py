"""Makes a model round its keys and values: in the cache where it has one, on the way where it has none.

Attention of transformers hands keys (behind the rotary embedding) and values to the cache that it is called with, and
goes on with what that returns. So one hook in front of each attention is enough, in a block as well as in a model:

    no cache             a ``RoundingCache`` takes its place
    an empty one         its layer is replaced by a ``QuantisedLayer``, in place: ``generate`` and everyone else who
                         holds the cache sees it
    a quantised one      is used as it is
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from quantkit.errors import QuantkitError
from quantkit.formats.kv import KVFormat
from quantkit.kv.cache import KVCache, RoundingCache, can_be_replaced, new_cache, use_quantised_layer
from quantkit.kv.interface import LayerKV
from quantkit.kv.quantiser import MinMax
from quantkit.kv.rotation import RandomHadamard
from quantkit.models.source import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
"""What the cache is called where an attention takes one."""


@dataclass(frozen=True)
class Attention:
    """A module that hands its keys and values to a cache."""

    path: str
    module: nn.Module
    layer: int
    argument: str
    """Of its forward: the cache."""
    position: int
    """Of that argument among the positional ones."""


def attentions(model: nn.Module) -> list[Attention]:
    """Every attention of ``model`` (or of a block) that takes a cache."""
    found = []
    for path, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        names = list(inspect.signature(module.forward).parameters) if isinstance(layer, int) else []
        argument = next((name for name in _ARGUMENTS if name in names), None)
        if isinstance(layer, int) and argument is not None:
            found.append(Attention(path, module, layer, argument, names.index(argument)))
    # Some blocks know their number, too, and pass the cache on.
    return [one for one in found if not any(other.path.startswith(f"{one.path}.") for other in found)]


def layer_kv(kv: KVFormat, layer: int) -> LayerKV:
    """How layer number ``layer`` of a model keeps its keys and values."""
    method = MinMax(kv.bits, kv.symmetric, kv.clip, kv.clip)
    rotated = kv.key_transform == "hadamard"
    return LayerKV(method, method, RandomHadamard(f"{kv.seed} {layer}") if rotated else None)


def quantise_kv(model: nn.Module, kv: KVFormat) -> None:
    """Make every attention of ``model`` (or of a block) keep keys and values as ``kv`` says, in place."""
    for one in attentions(model):
        hook = _Hook(one.argument, one.position, one.layer, layer_kv(kv, one.layer))
        one.module.register_forward_pre_hook(hook, with_kwargs=True)


class _Hook:
    def __init__(self, argument: str, position: int, layer: int, kv: LayerKV) -> None:
        self._argument = argument
        self._position = position
        self._layer = layer
        self._kv = kv

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_position = len(args) > self._position
        cache = args[self._position] if by_position else kwargs.get(self._argument)
        if cache is not None:
            use_quantised_layer(cache, self._layer, self._kv)
            return None
        rounding = RoundingCache(self._kv)
        if by_position:
            return (*args[: self._position], rounding, *args[self._position + 1 :]), kwargs
        return args, kwargs | {self._argument: rounding}


def why_not(model: PreTrainedModel) -> str:
    """Why the keys and values of ``model`` cannot be quantised, in words; empty if they can.

    Args:
        model: only its structure is looked at, so it may be on the meta device.
    """
    name = type(model).__name__
    if auto_class(model.config) is not AutoModelForCausalLM:
        return f"{name} does not predict the next token, so it has no cache"
    found = attentions(model)
    if not found:
        return f"no attention of {name} takes a cache that is handed its keys and values"
    layers = DynamicCache(config=model.config).layers
    for one in found:
        if one.layer < len(layers) and not can_be_replaced(layers[one.layer]):
            kind = type(layers[one.layer]).__name__
            return f"{name} keeps layer {one.layer} in a {kind}, of which there is no quantised form"
    return ""


def kv_format(model: PreTrainedModel) -> KVFormat | None:
    """How ``model``, a loaded checkpoint, keeps its keys and values; None: in full precision."""
    return getattr(getattr(model.config, "quantization_config", None), "kv", None)


def kv_cache(model: PreTrainedModel) -> KVCache:
    """A fresh cache for ``model``, to pass as ``past_key_values``; ``memory_report()`` says what it takes.

    A loaded model makes such a cache by itself; this is for those who want to hold it.

    Raises:
        QuantkitError: the checkpoint of ``model`` says nothing of a quantised cache.
    """
    kv = kv_format(model)
    if kv is None:
        raise QuantkitError(
            f"this {type(model).__name__} keeps keys and values in full precision; quantise it with a scheme that "
            "ends in KV<bits>, for example W4A16KV4, to have them quantised."
        )
    return new_cache(model.config, {one.layer: layer_kv(kv, one.layer) for one in attentions(model)})
