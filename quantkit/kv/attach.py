"""Makes a model round its keys and values: in the cache where it has one, on the way where it has none.

Attention of transformers hands keys (behind the rotary embedding) and values to the cache that it is called with, and
goes on with what that returns. So one hook in front of each attention is enough, in a block as well as in a model:

    no cache             a ``RoundingCache`` takes its place
    an empty one         its layer is replaced by a ``QuantisedLayer``, in place: ``generate`` and everyone else who
                         holds the cache sees it
    a quantised one      is used as it is

A method that keeps several tokens together (``CacheMethod.by_token`` is false) leaves layers with a sliding window as
transformers has them: those are bounded by the window, and a group could not be parted where the window ends.

What was learned about keys and values is held by the attention as buffers, under the names of ``formats/kv.py``: a
checkpoint fills them and ``.to(device)`` moves them. The hook makes of them what a cache needs, when it is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.kv import AnyKV, CacheFormat, KVFormat, LearnedKV, kv_of
from quantkit.kv import methods
from quantkit.kv.attention_function import choose_attention, use_dense_attention
from quantkit.kv.cache import KVCache, QuantisedLayer, RoundingCache, can_be_replaced, new_cache, use_quantised_layer
from quantkit.kv.interface import LayerFacts, LayerKV
from quantkit.kv.quantiser import MinMax
from quantkit.kv.rotation import KeyMatrix, RandomHadamard
from quantkit.models.source import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
"""What the cache is called where an attention takes one."""
_WIDTHS = ("qk_head_dim", "head_dim", "head_size")
"""What the width of a key is called; the first may differ from that of a value, which has the second."""
_VALUE_WIDTHS = ("v_head_dim", *_WIDTHS[1:])


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
    outer = {one.path: f"{one.path}." if one.path else "" for one in found}
    return [
        one for one in found if not any(other is not one and other.path.startswith(outer[one.path]) for other in found)
    ]


def key_dim(attention: nn.Module) -> int:
    """Numbers in a key of one head; 0: the module does not say."""
    return _width(attention, _WIDTHS)


def value_dim(attention: nn.Module) -> int:
    """Numbers in a value of one head; 0: the module does not say."""
    return _width(attention, _VALUE_WIDTHS)


def _width(attention: nn.Module, names: tuple[str, ...]) -> int:
    widths = [getattr(attention, name, None) for name in names]
    return next((width for width in widths if isinstance(width, int)), 0)


def _config(model: nn.Module, one: Attention) -> PreTrainedConfig | None:
    """Of the model that the attention is from, if it or the attention holds it."""
    found = getattr(model, "config", None) or getattr(one.module, "config", None)
    return found if isinstance(found, PreTrainedConfig) else None


def _kept(model: nn.Module, kv: AnyKV) -> list[Attention]:
    """The attentions of ``model`` (or of a block) whose keys and values ``kv`` is for."""
    found = attentions(model)
    if kv.by_token or not found:
        return found
    config = _config(model, found[0])
    sliding = [] if config is None else DynamicCache(config=config).is_sliding
    return [one for one in found if one.layer >= len(sliding) or not sliding[one.layer]]


def method_kv(kv: CacheFormat, one: Attention, config: PreTrainedConfig | None) -> LayerKV:
    """How the attention ``one`` of a model of ``config`` keeps its keys and values."""
    facts = LayerFacts(one.layer, key_dim(one.module), value_dim(one.module), config)
    return methods.get(kv.method).layer_kv(kv.config, facts)


def layer_kv(kv: KVFormat, layer: int, learned: LearnedKV | None = None) -> LayerKV:
    """How layer number ``layer`` of a model keeps its keys and values.

    Args:
        learned: about this layer; where ``kv`` says that it is stored.

    Raises:
        QuantkitError: the matrix has no inverse.
    """
    keys = values = MinMax(kv.bits, kv.symmetric, kv.clip, kv.clip)
    if learned is not None:
        keys, values = (
            MinMax(kv.bits, kv.symmetric, *_wide(clip).unbind()) for clip in (learned.key_clip, learned.value_clip)
        )
        if learned.key_matrix is not None:
            try:
                return LayerKV(keys, values, KeyMatrix(learned.key_matrix))
            except torch.linalg.LinAlgError:
                raise QuantkitError(
                    f"the key_matrix of layer {layer} has no inverse: the checkpoint is damaged; quantise or fetch it "
                    "again."
                ) from None
    return LayerKV(keys, values, RandomHadamard(f"{kv.seed} {layer}") if kv.key_transform == "hadamard" else None)


def unlearned(kv: KVFormat, one: Attention, dtype: torch.dtype) -> LearnedKV:
    """What an attention holds if nothing was learned about it: the clip of ``kv``, and the Hadamard matrix that keys
    would be rotated by, as a dense one."""
    clip, matrix = torch.full((2,), kv.clip, dtype=dtype), None
    if kv.key_transform == "dense":
        identity = torch.eye(key_dim(one.module), dtype=torch.float64)
        matrix = RandomHadamard(f"{kv.seed} {one.layer}").apply(identity).to(dtype)
    return LearnedKV(clip, clip.clone(), matrix)


def quantise_kv(model: nn.Module, kv: AnyKV, learned: Mapping[str, LearnedKV] | None = None) -> None:
    """Make every attention of ``model`` (or of a block) keep keys and values as ``kv`` says, in place.

    Args:
        learned: path of an attention -> what it holds, if ``kv`` says that it holds something; None: what it has to
            hold is going to be loaded.

    Raises:
        QuantkitError: an attention of the model does not say how wide its keys are, on which the tensors depend.
    """
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    for one in _kept(model, kv):
        shapes = kv.tensor_shapes(key_dim(one.module))
        if not all(all(shape) for shape in shapes.values()):
            raise QuantkitError(
                f"quantization_config.kv_cache.key_transform is dense, but {type(one.module).__name__} does not say "
                "how wide its keys are; config.json does not fit this model or this version of transformers."
            )
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            one.module.register_buffer(name, empty if learned is None else learned[one.path].tensors()[name])
        hook = KVHook(one, kv, _config(model, one))
        hook.handle = one.module.register_forward_pre_hook(hook, with_kwargs=True)


class KVHook:
    """In front of an attention: what it does with keys and values goes through a quantised cache."""

    def __init__(self, one: Attention, kv: AnyKV, config: PreTrainedConfig | None = None) -> None:
        self.format = kv
        self.handle: RemovableHandle | None = None
        self._method = method_kv(kv, one, config) if isinstance(kv, CacheFormat) else None
        self.trial: LayerKV | None = None
        """In the place of what the attention holds: while it is learned."""
        self._argument, self._position, self._layer = one.argument, one.position, one.layer
        self._built: LayerKV | None = None
        self._held: list[tuple[Tensor, int]] = []
        """The tensors that it was built from, and how often each had been written to."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kv = self.trial or self.layer_kv(module)
        by_position = len(args) > self._position
        cache = args[self._position] if by_position else kwargs.get(self._argument)
        if cache is not None:
            use_quantised_layer(cache, self._layer, kv)
            return None
        rounding = RoundingCache(kv)
        if by_position:
            return (*args[: self._position], rounding, *args[self._position + 1 :]), kwargs
        return args, kwargs | {self._argument: rounding}

    @property
    def learnable(self) -> KVFormat:
        """The format, of which something is to be learned."""
        assert isinstance(self.format, KVFormat)
        return self.format

    def layer_kv(self, module: nn.Module) -> LayerKV:
        """How ``module``, the attention, keeps its keys and values, by what it holds."""
        if self._method is not None:
            return self._method
        held = {name: module.get_buffer(name) for name in self.format.tensor_shapes(0)}
        now = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in held.values()]
        known = len(now) == len(self._held) and all(
            tensor is other and version == last
            for (tensor, version), (other, last) in zip(now, self._held, strict=True)
        )
        if self._built is None or not known:
            # Copies: through a tensor that was born in inference mode no gradient passes.
            with torch.inference_mode(False), torch.no_grad():
                learned = LearnedKV(**{name: tensor.clone() for name, tensor in held.items()}) if held else None
                self._built, self._held = layer_kv(self.learnable, self._layer, learned), now
        return self._built


def kv_hooks(model: nn.Module) -> dict[str, KVHook]:
    """Path of an attention -> what was put in front of it."""
    return {
        path: hook
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, KVHook)
    }


def _wide(clip: Tensor) -> Tensor:
    return clip if clip.dtype == torch.float64 else clip.float()


def why_not(model: PreTrainedModel, kv: AnyKV | None = None) -> str:
    """Why the keys and values of ``model`` cannot be quantised, in words; empty if they can.

    Args:
        model: only its structure is looked at, so it may be on the meta device.
        kv: as this wants it; None: by any method.
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
    if isinstance(kv, CacheFormat) and not _kept(model, kv):
        return f"{kv.method} encodes several tokens together, and every layer of {name} has a sliding window"
    return ""


def set_kv(model: PreTrainedModel, kv: AnyKV | None, attention: str | None = None) -> None:
    """From now on ``model``, quantised or not, keeps keys and values as ``kv`` says; None: in full precision.

    Every forward and every ``generate`` that is given no cache goes by it. What a checkpoint says is overruled; what
    was learned for it stays where it is.

    Args:
        attention: as for ``kv_cache``; dense: ``model`` has the attention again that it came with.

    Raises:
        RecipeError: there is no such attention.
        QuantkitError: the model has no cache, or none of this kind, or cannot have such an attention.
    """
    if kv is not None:
        _refuse(model, kv)
    for hook in kv_hooks(model).values():
        assert hook.handle is not None
        hook.handle.remove()
    use_dense_attention(model)  # its hooks have to come behind ours
    if kv is not None:
        quantise_kv(model, kv, {})
        choose_attention(model, attentions(model), attention)


def kv_format(model: PreTrainedModel) -> AnyKV | None:
    """How ``model`` keeps its keys and values; None: in full precision."""
    return next((hook.format for hook in kv_hooks(model).values()), None)


def kv_cache(
    method: str | PreTrainedModel | None = None,
    *,
    model: PreTrainedModel | None = None,
    attention: str | None = None,
    **settings: Any,
) -> KVCache:
    """A fresh cache, to pass as ``past_key_values``; ``memory_report()`` says what it takes.

        kv_cache(model)                                 as its checkpoint says
        kv_cache("kivi", bits=2, model=model)           by a method of `quantkit methods`, for any model
        kv_cache("rotation-3bit", model=model)          by a name with the settings in it

    A model whose checkpoint says how to keep keys and values makes such a cache by itself; this is for those who want
    to hold it, or another one.

    Args:
        attention: packed: attention reads the cache block by block while it generates, so what it takes does not grow
            with the context; the model is set up for that (``kv/attention_function.py``). dense: all keys and values
            are read back for each token. None: packed on a CPU, where it is as fast or faster, else dense.

    Raises:
        RecipeError: no such method or setting, with the nearest known one, or a value that a setting cannot have.
        QuantkitError: the checkpoint says nothing of a quantised cache, or the model has none of this kind, or cannot
            have such an attention.
    """
    if not isinstance(method, str | None):
        method, model = None, method
    if model is None:
        raise RecipeError("kv_cache needs the model that the cache is for: kv_cache('kivi-2bit', model=model).")
    if method is not None:
        return empty_cache(model, kv_of(method, settings), attention)
    if settings:
        raise RecipeError(f"kv_cache was given {', '.join(settings)} but no method; name one first, as 'kivi'.")
    kv = kv_format(model)
    if kv is None:
        raise QuantkitError(
            f"this {type(model).__name__} keeps keys and values in full precision; name a method, for example "
            "kv_cache('kivi-2bit', model=model), or quantise it with a scheme that ends in KV<bits>, for example "
            "W4A16KV4."
        )
    return empty_cache(model, kv, attention)


def empty_cache(model: PreTrainedModel, kv: AnyKV | None, attention: str | None = None) -> KVCache:
    """For ``model``, by ``kv``; None: all layers as transformers keeps them.

    Args:
        attention: as for ``kv_cache``.

    Raises:
        RecipeError: there is no such attention.
        QuantkitError: the model has no cache, or none of this kind, or not what was learned for it, or cannot have
            such an attention.
    """
    if kv is None:
        return new_cache(model.config, {})
    hooks, found = kv_hooks(model), attentions(model)
    if kv == kv_format(model):
        made = {one.layer: hooks[one.path].layer_kv(one.module) for one in found if one.path in hooks}
    else:
        _refuse(model, kv)
        made = {
            one.layer: method_kv(kv, one, model.config) if isinstance(kv, CacheFormat) else layer_kv(kv, one.layer)
            for one in _kept(model, kv)
        }
    cache = new_cache(model.config, made, kv)
    packed = choose_attention(model, found, attention)
    for layer in cache.layers:
        if isinstance(layer, QuantisedLayer):
            layer.packed = packed
    return cache


def _refuse(model: PreTrainedModel, kv: AnyKV) -> None:
    """Raise if ``model`` cannot keep its keys and values by ``kv``, of which nothing was learned yet."""
    reason = why_not(model, kv)
    if not reason and kv.learned_clips:
        reason = f"this {type(model).__name__} does not hold what was learned for the cache"
    if reason:
        raise QuantkitError(f"{reason}; leave the cache in full precision, or choose one of `quantkit methods`.")
