"""Attention functions of transformers that find a quantised cache behind the keys, and read it block by block.

Attention of transformers gets keys and values from ``Cache.update`` and hands them to a function that is registered
under the name of the model's attention implementation; neither is told which cache it was. So

    a hook in front of the attention     lends the cache's layer to it (``cache.Lent``)
    QuantisedLayer.update                returns the new keys, with the loan on them as an attribute
    the registered function              finds the loan and attends to what the layer holds
    a hook behind the attention          sees that it did

A model that changed keys between ``update`` and the function would lose the attribute. So an attention first gets all
keys, read back as ever, with a loan on them: what arrives then arrives always. That is the first call, as a rule the
prompt, which is read back in any case. If nothing arrives, the attention goes on as it would without all this.

What the function does not know (weights that are asked for, sinks, a bias), and what has no loan (prompts, sliding
windows, caches in full precision), goes to the implementation that the model had before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.errors import QuantkitError, RecipeError
from quantkit.kv.cache import Lent, QuantisedLayer
from quantkit.kv.packed_attention import attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.kv.attach import Attention

NAMES = {"sdpa": "quantkit_kv", "eager": "quantkit_kv_plain"}
"""What a model had -> the name of the implementation that takes its place. Names with sdpa, flash or flex in them mean
something to transformers."""
MOST_QUERIES = 16
"""Tokens of a call above which the layer is read back: the prompt, or a part of it."""
PACKED, DENSE = ATTENTIONS = "packed", "dense"
_KNOWN = {"position_ids", "cache_position"}
"""Tensors that attention functions are given and do not need."""


def why_dense(model: PreTrainedModel, found: list[Attention]) -> str:
    """Why the attentions ``found`` of ``model`` cannot read packed keys and values, in words; empty if they can."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not found:
        return f"no attention of {name} takes a cache"
    if not type(model)._can_set_attn_implementation():
        return f"attention of {name} is not called through a registered function"
    before = {_implementation(one.config) for one in model.modules() if isinstance(one, PreTrainedModel)}
    if len(before) > 1:
        return f"parts of {name} have different attention implementations ({', '.join(sorted(map(str, before)))})"
    (only,) = before
    if only not in (*NAMES, *NAMES.values()):
        return f"{name} has the attention implementation '{only}', and only sdpa and eager are taken over from"
    if only == "eager" and any(_eager(one.module) is None for one in found):
        return f"the code of {name} has no eager attention of the usual form"
    return ""


def choose_attention(model: PreTrainedModel, found: list[Attention], attention: str | None) -> bool:
    """Set ``model`` up for what is wanted of its attentions ``found``.

    Args:
        attention: packed; dense: ``model`` stays as it is; None: packed on a CPU if it can be, else dense.

    Returns:
        Whether it is packed.

    Raises:
        RecipeError: there is no such attention.
        QuantkitError: packed is wanted and cannot be.
    """
    if attention not in (*ATTENTIONS, None):
        raise RecipeError(f"attention is {attention!r}; use one of {', '.join(ATTENTIONS)}.")
    reason = "" if attention == DENSE else why_dense(model, found)
    if attention == PACKED and reason:
        raise QuantkitError(f"{reason}; use attention='dense', which reads keys and values back for every token.")
    # On a GPU blocks are read by many small kernels, one after the other: that saves memory, not time. NSNQuant has one
    # kernel for all of it; how fast that is nobody has measured.
    packed = attention == PACKED or (attention is None and not reason and model.device.type == "cpu")
    if packed:
        use_packed_attention(model, found)
    return packed


def use_packed_attention(model: PreTrainedModel, found: list[Attention]) -> None:
    """Let the attentions ``found`` of ``model``, which can (``why_dense``), read layers of a quantised cache block by
    block. If they are already, nothing changes."""
    now = _implementation(model.config)
    if now in NAMES.values() and len(_lendings(model)) == len(found):
        return
    use_dense_attention(model)
    _register()
    model.set_attn_implementation(NAMES[str(_implementation(model.config))])
    for one in found:
        lending = Lending(one)
        lending.handles = (
            one.module.register_forward_pre_hook(lending.before, with_kwargs=True),
            one.module.register_forward_hook(lending.after),
        )


def use_dense_attention(model: PreTrainedModel) -> None:
    """Undo ``use_packed_attention``; nothing happens if it was not called."""
    for lending in _lendings(model):
        for handle in lending.handles:
            handle.remove()
    held = {name: before for before, name in NAMES.items()}
    now = _implementation(model.config)
    if now in held:
        model.set_attn_implementation(held[now])


class Lending:
    """In front of an attention and behind it."""

    def __init__(self, one: Attention) -> None:
        self.handles: tuple[RemovableHandle, ...] = ()
        self.proven = False
        """A loan has arrived."""
        self._argument, self._position, self._layer = one.argument, one.position, one.layer
        self._lent: Lent | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lend the layer of the cache in the arguments, if it is a quantised one of all tokens."""
        self._lent = None
        by_position = len(args) > self._position
        cache = args[self._position] if by_position else kwargs.get(self._argument)
        layers: Any = getattr(cache, "layers", ())
        layer = layers[self._layer] if self._layer < len(layers) else None
        if not isinstance(layer, QuantisedLayer) or layer.window is not None or not layer.packed:
            return
        if torch.is_grad_enabled() or _implementation(getattr(module, "config", None)) not in NAMES.values():
            return
        states = kwargs.get("hidden_states", args[0] if args else None)
        short = isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] <= MOST_QUERIES
        if self.proven and not short:
            return
        layer.lent = self._lent = Lent(layer, whole=not self.proven)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """
        Raises:
            QuantkitError: the attention went on with new keys alone.
        """
        lent, self._lent = self._lent, None
        if lent is None:
            return
        lent.layer.lent = None
        if lent.whole:
            self.proven = lent.seen
        elif not lent.seen:
            raise QuantkitError(
                f"{type(module).__name__} of layer {self._layer} changes keys on their way from the cache, though it "
                "did not before, so what was computed is wrong; use attention='dense'."
            )


def _lendings(model: nn.Module) -> list[Lending]:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Lending)]


def _packed(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function: query [batch, heads, n, head_dim] -> ([batch, n, heads, head_dim], weights or None).

    Args:
        before: the implementation that the model had.
    """
    lent = Lent.on(key)
    if lent is not None:
        lent.seen = True
        if query.shape[2] <= MOST_QUERIES and _is_plain(lent.layer, query, attention_mask, kwargs):
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = attend(query, lent.layer, attention_mask, scaling, kwargs.get("softcap"))
            return output.transpose(1, 2).contiguous(), None
        if not lent.whole:
            key, value = lent.layer.read()
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dense: Any = sdpa_attention_forward if before == "sdpa" else _eager(module)
    result: tuple[Tensor, Tensor | None] = dense(module, query, key, value, attention_mask, **kwargs)
    return result


def _is_plain(layer: QuantisedLayer, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Is nothing wanted but softmax(scaling * q k.T) v, with a mask and a cap?"""
    if kwargs.get("output_attentions") or kwargs.get("dropout"):
        return False
    if any(isinstance(value, Tensor) and name not in _KNOWN for name, value in kwargs.items()):
        return False
    if mask is None:  # a few queries without a mask: which sees which is left to the implementation
        return query.shape[2] == 1
    return mask.dim() == 4 and mask.shape[-1] == layer.get_seq_length()


def _implementation(config: Any) -> str | None:
    return getattr(config, "_attn_implementation", None)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """What the modelling file of ``module`` has for itself."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def _register() -> None:
    """Make the functions known to transformers; not on import, which may be while transformers itself is imported."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for before, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(NAMES[before], partial(_packed, before))
        AttentionMaskInterface.register(NAMES[before], mask)
