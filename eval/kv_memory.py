"""What the cache of a model takes once a window of text has gone through it: measured, not worked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from quantkit.eval.streaming import held_by, share_of_codes
from quantkit.kv.attach import kv_cache, kv_format
from quantkit.kv.cache import QuantisedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.kv.cache import KVCache
    from quantkit.kv.interface import Method

_FILLED = 1024, 5120
"""Tokens; between them lie 4096 that every method holds as codes, in whole groups and chunks."""


@torch.inference_mode()
def filled_cache(model: PreTrainedModel, tokens: int) -> KVCache | None:
    """A cache of ``model`` that holds ``tokens`` tokens; None: the model keeps keys and values in full precision.

    Which tokens they are makes no difference to what is wanted of it, ``memory_report()``.
    """
    if kv_format(model) is None:
        return None
    cache = kv_cache(model)
    ids = torch.arange(tokens, device=model.device) % model.config.get_text_config().vocab_size
    model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
def cache_facts(model: PreTrainedModel, tokens: int, stream: bool) -> dict[str, Any]:
    """What stands beside a perplexity of ``model`` on windows of ``tokens``; empty: it keeps all in full precision.

    bits_of_codes    per element of a token that is held as codes, by which a long cache grows
    read_from_codes  share of the pairs of a token and one that it sees

    Args:
        stream: as for ``window_losses``.
    """
    cache = filled_cache(model, tokens)
    if cache is None:
        return {}
    layers = [layer for layer in cache.layers if isinstance(layer, QuantisedLayer)]
    return {"bits_of_codes": round(_bits_of_codes(layers), 3)} | how_read(model, cache, stream)


def how_read(model: PreTrainedModel, cache: KVCache, stream: bool) -> dict[str, Any]:
    """``read_from_codes`` and ``stream`` of ``cache_facts``.

    Args:
        cache: ``filled_cache(model, ...)``.
    """
    tokens = cache.get_seq_length()
    layers = [layer for layer in cache.layers if isinstance(layer, QuantisedLayer)]
    share = share_of_codes(held_by(model), tokens) if stream else _share_in_one_pass(layers, tokens)
    return {"read_from_codes": round(share, 4), "stream": stream}


def _share_in_one_pass(layers: Sequence[QuantisedLayer], tokens: int) -> float:
    """As ``share_of_codes``, where every token reads what is held at the end of the window."""
    stores = [store for layer in layers for store in layer.stores]
    read = 0
    for store in stores:
        first = store.grain[0]
        read += sum(tokens - number for number in range(first, first + store.coded_after(tokens)))
    return read / (len(stores) * tokens * (tokens + 1) / 2)


def _bits_of_codes(layers: Sequence[QuantisedLayer]) -> float:
    """What 4096 more tokens take, per element, averaged over all keys and values."""
    taken, elements = 0, 0
    for layer in layers:
        for method, like in zip((layer.kv.keys, layer.kv.values), layer.read(), strict=True):
            width = like.shape[-1]
            less, more = (_bytes_of(method, tokens, width) for tokens in _FILLED)
            taken, elements = taken + more - less, elements + (_FILLED[1] - _FILLED[0]) * width
    return 8 * taken / elements


def _bytes_of(method: Method, tokens: int, width: int) -> int:
    """That a store of one head keeps alive, in bfloat16 what is as it came."""
    store = method.store()
    states = torch.randn(1, 1, tokens, width, generator=torch.Generator().manual_seed(0))
    store.put(states.bfloat16())
    return sum(tensor.untyped_storage().nbytes() for tensor in store.tensors())
