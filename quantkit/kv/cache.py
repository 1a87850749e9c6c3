"""Caches of transformers whose layers keep keys and values quantised.

``QuantisedLayer`` takes the place of transformers' ``DynamicLayer`` and ``DynamicSlidingWindowLayer`` in any ``Cache``.
What it is given is encoded once and never again; what it returns, the tokens of the current call included, is read back
from what it holds: attention sees what is stored, whether a sequence comes whole, in chunks or token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from quantkit.errors import QuantkitError
from quantkit.formats.kv import AnyKV
from quantkit.kv.interface import ChunkedStore, LayerKV, Store

if TYPE_CHECKING:
    from quantkit.kv.memory import MemoryReport


@dataclass(eq=False)
class Lent:
    """A layer on loan to an attention that reads it by itself; ``update`` puts it on the keys that it returns.

    Attention gets a cache's keys and values, but not the cache: this is how it finds its way back.
    """

    layer: QuantisedLayer
    whole: bool
    """``update`` returns all tokens, as without a loan; False: the new ones as they came, and nothing is read back."""
    seen: bool = False
    """It has arrived."""

    @staticmethod
    def on(keys: Tensor) -> Lent | None:
        """What ``keys`` came with."""
        return getattr(keys, _LENT, None)


_LENT = "_quantkit_lent"


class QuantisedLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Args:
        kv: how they are kept.
        window: tokens that a query sees, itself included: older ones are dropped; None: all.
        packed: an attention that can read what is held by itself (``attention_function.py``) may do so.
    """

    is_croppable = True
    supports_early_init = False  # nothing is known about what a store needs before it is given something

    def __init__(self, kv: LayerKV, window: int | None = None, packed: bool = True) -> None:
        super().__init__()
        self.kv = kv
        self.packed = packed
        self.window = window
        self.is_sliding = window is not None
        self.record_past = False
        self.lent: Lent | None = None
        """To whoever calls ``update`` next."""
        self._keys: Store
        self._values: Store
        self._seen: int
        self._like: tuple[Tensor, Tensor] | None
        """Keys and values of no token, [batch, heads, 0, head_dim]: what the next ones have to look like."""
        self._restart()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values of ``n`` tokens, both [batch, heads, n, head_dim] (of their own size each).

        Returns:
            Keys and values of all tokens that the ``n`` may see, as they are stored, in the dtype they came in.

        Raises:
            QuantkitError: they are of another number of sequences, heads or channels than those held.
        """
        lent, self.lent = self.lent, None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        self._hold(self.record_past)
        new = key_states.shape[-2]
        transform = self.kv.transform
        given = key_states if transform is None else transform.apply(key_states)
        if lent is not None and not lent.whole:
            self._keys.put(given)
            self._values.put(value_states)
            self._seen += new
            keys = key_states.view_as(key_states)
            setattr(keys, _LENT, lent)
            return keys, value_states
        keys = self._keys.append(given)
        keys = keys if transform is None else transform.undo(keys)
        values = self._values.append(value_states)
        self._seen += new
        if self.window is not None:
            visible = self.window - 1 + new  # as the mask was told; a store may hold more
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
            if not self.record_past:
                self._drop_unseen()
        if lent is not None:
            keys = keys.view_as(keys)
            setattr(keys, _LENT, lent)
        return keys, values

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens held, as ``update`` returns them."""
        assert self._like is not None
        keys, values = (
            store.read(0, store.length, like.dtype) for store, like in zip(self.stores, self._like, strict=True)
        )
        return (keys if self.kv.transform is None else self.kv.transform.undo(keys)), values

    @property
    def stores(self) -> tuple[Store, Store]:
        """Of the keys (behind ``kv.transform``) and of the values."""
        return self._keys, self._values

    @property
    def heads(self) -> int:
        """Of the keys and values held."""
        return 0 if self._like is None else self._like[0].shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that the next ``update`` returns, number of the first of them)"""
        offset = 0 if self.window is None else max(self._seen - self.window + 1, 0)
        return self._seen - offset + query_length, offset

    def get_seq_length(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        self._restart()
        self.is_initialized = False

    def activate_past_recording(self) -> None:
        """Keep what leaves the window, and encode no groups, until the next ``crop``, which may take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: the number is positive.
            RuntimeError: tokens have left the window for good (no ``activate_past_recording``).
            QuantkitError: a group of tokens that was encoded together would be parted; nothing is changed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove and self.window is not None and self._seen >= self.window and not self.record_past:
            raise RuntimeError(
                "crop: tokens before those to remove have left the window; call activate_past_recording() on the cache "
                "before they are generated"
            )
        if tokens_to_remove:
            for store in (self._keys, self._values):
                store.keep(0, max(0, store.length + tokens_to_remove))
            self._seen = max(0, self._seen + tokens_to_remove)
        self._drop_unseen()
        self._hold(False)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        self._change(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change(lambda part: part.to(self.device, non_blocking=True))

    @property
    def elements(self) -> int:
        """Numbers that the held tokens stand for."""
        return self._keys.elements + self._values.elements

    def tensors(self) -> Iterable[Tensor]:
        """Everything that the layer keeps alive."""
        yield from self._keys.tensors()
        yield from self._values.tensors()
        if self.kv.transform is not None:
            yield from self.kv.transform.tensors()

    def state(self) -> dict[str, Tensor]:
        """All that ``load`` of another layer with the same ``kv`` needs to go on as this one; empty: holds nothing."""
        if self._like is None:
            return {}
        like = {"keys": self._like[0], "values": self._like[1], "seen": torch.tensor(self._seen)}
        parts = {"key": self._keys.state(), "value": self._values.state()}
        return like | {f"{side}.{name}": part for side, held in parts.items() for name, part in held.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Hold what ``state`` of another layer gave."""
        self.reset()
        if not state:
            return
        self._like, self._seen = (state["keys"], state["values"]), int(state["seen"])
        self.lazy_initialization(*self._like)
        for side, store in (("key.", self._keys), ("value.", self._values)):
            store.load({name.removeprefix(side): part for name, part in state.items() if name.startswith(side)})

    def _restart(self) -> None:
        self._keys, self._values = self.kv.keys.store(), self.kv.values.store()
        self._seen, self._like = 0, None

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if self._like is None:
            self._like = keys[:, :, :0].detach().clone(), values[:, :, :0].detach().clone()
        for what, held, given in (("keys", self._like[0], keys), ("values", self._like[1], values)):
            if (held.shape[:2], held.shape[3]) != (given.shape[:2], given.shape[3]):
                raise QuantkitError(
                    f"the cache holds {what} of {_shape(held)} and was given {_shape(given)}: it is of another batch "
                    "or another model; take a cache of its own for each, or call reset() on this one."
                )

    def _hold(self, hold: bool) -> None:
        for store in (self._keys, self._values):
            if isinstance(store, ChunkedStore):
                if store.hold and not hold:
                    store.settle()
                store.hold = hold

    def _drop_unseen(self) -> None:
        """Tokens that no later query sees."""
        for store in (self._keys, self._values):
            surplus = 0 if self.window is None else store.length - (self.window - 1)
            if surplus > 0:
                store.keep(surplus, store.length)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._keys.change(change)
        self._values.change(change)
        if self._like is not None:
            self._like = change(self._like[0]), change(self._like[1])


def _shape(states: Tensor) -> str:
    return f"{states.shape[0]} sequences with {states.shape[1]} heads of {states.shape[3]} numbers"


class KVCache(Cache):
    """One layer for each of the model's, in transformers' own order; whoever made it has decided what each is.

    Args:
        kv: what its quantised layers were made of, to be saved with them; None: there are none, or nobody said.
    """

    def __init__(self, layers: list[Any], kv: AnyKV | None = None) -> None:
        super().__init__(layers=layers)
        self.kv = kv

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As ``Cache.update``.

        Raises:
            QuantkitError: the model has more layers than the cache, or fewer, or other heads.
        """
        if layer_idx >= len(self.layers):
            raise QuantkitError(
                f"the cache was made for a model of {len(self.layers)} layers and was given keys of layer {layer_idx}: "
                "it is of another model; take quantkit.kv_cache of this one."
            )
        if layer_idx == 0:
            self._check_filled()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_filled(self) -> None:
        """Every layer was reached by the forwards before."""
        lengths = [layer.get_seq_length() for layer in self.layers if isinstance(layer, QuantisedLayer)]
        if len(set(lengths)) > 1:
            filled = sum(length == max(lengths) for length in lengths)
            raise QuantkitError(
                f"the cache was made for a model with {len(lengths)} quantised layers, of which {filled} hold all "
                "tokens: it is of another model, or a forward broke off; take a new quantkit.kv_cache of this one."
            )

    def memory_report(self) -> MemoryReport:
        """What it takes now."""
        from quantkit.kv.memory import memory_report

        return memory_report(self)

    def save(self, path: str | Path) -> None:
        """Write all that is held into the safetensors file ``path``; ``quantkit.load_cache`` reads it.

        Raises:
            QuantkitError: a layer is of a kind that cannot be saved, or the file cannot be written.
        """
        from quantkit.kv.saved import save_cache

        save_cache(self, Path(path))


class RoundingCache(Cache):
    """Stands for a cache in a forward without one: the layer's keys and values are rounded, and nothing is kept."""

    def __init__(self, kv: LayerKV) -> None:
        super().__init__(layers=[])
        self.kv = kv

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(key_states.device.type, enabled=False):  # as at run time
            return self.kv.round(key_states, value_states)


def new_cache(config: PreTrainedConfig, layers: dict[int, LayerKV], kv: AnyKV | None = None) -> KVCache:
    """A cache for a model of ``config``, empty; layers without an entry are kept as transformers keeps them.

    Args:
        kv: what ``layers`` were made of.
    """
    cache = DynamicCache(config=config)
    for index, layer in layers.items():
        use_quantised_layer(cache, index, layer)
    return KVCache(cache.layers, kv)


def use_quantised_layer(cache: Cache, index: int, kv: LayerKV) -> None:
    """See to it that layer ``index`` of ``cache`` keeps its keys and values quantised.

    An empty layer of a ``DynamicCache`` is replaced by one that keeps them as ``kv`` says; a ``QuantisedLayer`` stays,
    and so does every layer of a ``KVCache``. The cache remains the object that it is, so whoever holds it goes on with
    it.

    Raises:
        QuantkitError: the layer is of another kind, or holds keys in full precision, or is moved to the CPU and back.
    """
    if isinstance(cache, RoundingCache | KVCache):
        return
    if cache.offloading:
        raise QuantkitError(
            "the keys and values of this model are quantised, which an offloaded cache is not made for; leave "
            "cache_implementation='offloaded' out, or load the model in full precision."
        )
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, QuantisedLayer):
        return
    tokens = layer.get_seq_length() if can_be_replaced(layer) else 0
    if tokens or not can_be_replaced(layer):
        content = f" with {tokens} tokens in full precision" if tokens else ""
        raise QuantkitError(
            f"the keys and values of this model are quantised, but the cache it was given holds layer {index} in a "
            f"{type(layer).__name__}{content}; pass past_key_values=quantkit.kv_cache(model), an empty DynamicCache, "
            "or none, and no cache_implementation."
        )
    quantised = QuantisedLayer(kv, getattr(layer, "sliding_window", None))
    if getattr(layer, "record_past", False):
        quantised.activate_past_recording()
    cache.layers[index] = quantised


def can_be_replaced(layer: Any) -> bool:
    """Does a ``QuantisedLayer`` do all that ``layer`` does? Subclasses keep more than keys and values."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
