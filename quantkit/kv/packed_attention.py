"""Attention of a few queries over a cache that is read block by block: what it takes does not grow with the context.

    z_t = scale <q, k_t>     z_t = cap tanh(z_t / cap), if there is a cap     out = sum_t exp(z_t) v_t / sum_t exp(z_t)

with the softmax kept up to date while the tokens t go by (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3): for a
block with the largest logit Z,

    M' = max(M, Z)      sums' = exp(M - M') sums + sum over the block of exp(z_t - M') v_t

and the same with 1 in the place of v_t. Sums are in float32, or in float64 if the queries are. How keys are multiplied
and values added up is a reader's business: ``Read`` decodes a block of any ``Store``, ``nsn_attention.py`` multiplies
codes where they lie. One query token over codes of NSNQuant on a GPU is the business of a kernel,
``kernels/triton/kv_attention.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quantkit.kernels.triton import kv_attention
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.interface import KeyTransform, Store
from quantkit.kv.nsn_attention import NSNKeys, NSNValues
from quantkit.kv.nsn_store import NSNStore, View
from quantkit.kv.quantiser import wide

_BLOCK, _BLOCK_ON_GPU = 2**20, 2**24
"""Keys' numbers that are read at a time: 4 MiB in float32, and as many as make launching kernels cheap."""


class KeyReader(Protocol):
    """The keys of a layer and the queries that they are multiplied with, [batch, heads, rows, head_dim]; ``heads`` are
    those of the keys, ``rows`` the queries that share one."""

    def logits(self, first: int, last: int) -> Tensor:
        """Products with tokens ``first`` to ``last - 1``, [batch, heads, rows, last - first]."""


class ValueReader(Protocol):
    """The values of a layer."""

    def sums(self, weights: Tensor, first: int, last: int) -> Tensor:
        """Of tokens ``first`` to ``last - 1`` with ``weights`` [batch, heads, rows, last - first]: something [batch,
        heads, rows, ...] that is linear in the weights."""

    def output(self, sums: Tensor) -> Tensor:
        """[batch, heads, rows, head_dim] for what ``sums`` of all tokens add up to; linear, too."""


class Read:
    """Keys or values that are decoded, a block at a time. A ``KeyReader`` and a ``ValueReader``.

    Args:
        rows: queries; of values anything in the dtype that is to be computed in.
        transform: what keys went through on their way into ``store``.
    """

    def __init__(self, store: Store, rows: Tensor, transform: KeyTransform | None = None) -> None:
        self._store, self._rows, self._transform = store, rows, transform

    def logits(self, first: int, last: int) -> Tensor:
        return self._rows @ self._tokens(first, last).mT

    def sums(self, weights: Tensor, first: int, last: int) -> Tensor:
        return weights @ self._tokens(first, last)

    def output(self, sums: Tensor) -> Tensor:
        return sums

    def _tokens(self, first: int, last: int) -> Tensor:
        read = self._store.read(first, last, self._rows.dtype)
        return read if self._transform is None else self._transform.undo(read)


@torch.no_grad()
def attend(
    query: Tensor, layer: QuantisedLayer, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention over all that ``layer`` holds.

    Args:
        query: [batch, query_heads, n, head_dim]; as many of its heads as there are for each of the keys' share one.
        mask: [batch or 1, query_heads or 1, n or 1, tokens of the layer]: True where a query sees a token, or numbers
            that are added to the logits; None: all are seen. A query that sees nothing gets 0 if it says False.
        scaling: of the logits.
        softcap: cap of the logits; None: there is none.

    Returns:
        [batch, query_heads, n, head_dim of the values] in the dtype of ``query``.
    """
    with torch.autocast(query.device.type, enabled=False):
        seen, added = _views(layer)
        if seen is not None and added is not None and kv_attention.refuses(query, seen, added) is None:
            return kv_attention.attend(query, seen, added, mask, scaling, softcap)
        heads, length = layer.heads, layer.get_seq_length()
        shared = query.shape[1] // heads
        rows = (query.to(wide(query.dtype)) * scaling).unflatten(1, (heads, shared)).flatten(2, 3)
        keys, values = _readers(layer, rows, seen, added)
        least = torch.finfo(rows.dtype).min
        highest = torch.full_like(rows[..., :1], least)
        total = torch.zeros_like(highest)
        sums: Tensor | float = 0.0
        for first, last in _blocks(layer, rows.shape[0] * heads * rows.shape[-1], length):
            logits = keys.logits(first, last)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if mask is not None:
                logits = _masked(logits, mask[..., first:last], shared)
            new = torch.maximum(highest, logits.amax(-1, keepdim=True))
            weights, faded = torch.exp(logits - new), torch.exp(highest - new)
            total = total * faded + weights.sum(-1, keepdim=True)
            sums = sums * faded + values.sums(weights, first, last)
            highest = new
        assert isinstance(sums, Tensor)
        output = values.output(sums / total.clamp(min=torch.finfo(rows.dtype).tiny))
        return output.unflatten(2, (shared, -1)).flatten(1, 2).to(query.dtype)


def _views(layer: QuantisedLayer) -> tuple[View | None, View | None]:
    """Of keys and values that queries can be multiplied with, and added up, as they are packed."""
    keys, values = (store.view() if isinstance(store, NSNStore) else None for store in layer.stores)
    return keys if layer.kv.transform is None else None, values


def _readers(
    layer: QuantisedLayer, rows: Tensor, seen: View | None, added: View | None
) -> tuple[KeyReader, ValueReader]:
    keys, values = layer.stores
    return (
        Read(keys, rows, layer.kv.transform) if seen is None else NSNKeys(seen, rows),
        Read(values, rows) if added is None else NSNValues(added, rows.dtype),
    )


def _blocks(layer: QuantisedLayer, token_numbers: int, length: int) -> Iterator[tuple[int, int]]:
    """First and last token of each block; where something was encoded as one, it is not cut.

    Args:
        token_numbers: numbers of one token in all sequences and heads.
    """
    start, unit = layer.stores[0].grain
    numbers = _BLOCK if layer.device.type == "cpu" else _BLOCK_ON_GPU
    size = max(1, numbers // (token_numbers * unit)) * unit
    at = 0
    while at < length:
        stop = min(start if at < start else at + size, length)
        yield at, stop
        at = stop


def _masked(logits: Tensor, mask: Tensor, shared: int) -> Tensor:
    """``logits`` [batch, heads, shared * n, tokens] as ``mask`` says."""
    batch, heads, rows, tokens = logits.shape
    split = logits.view(batch, heads, shared, rows // shared, tokens)
    # One mask for all heads, or one for each head of the queries.
    spread = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (heads, shared))
    split = split.masked_fill(~spread, -torch.inf) if spread.dtype == torch.bool else split + spread
    return split.view(logits.shape)
