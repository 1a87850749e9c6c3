"""Products of queries with packed NSNQuant keys, and weighted sums of packed values, without reading them back.

With the names of ``nsn_encode.py``, for a query q and weights p_t:

    <q, k_t>       = ~n1_t ( g_t <H q, q_t> + <q, R(p_t) ~m> )
    sum_t p_t v_t  = H.T sum_t (p_t ~n1_t g_t) q_t + sum over chunks of (sum_t p_t ~n1_t) ~m

(Son et al., NSNQuant, arXiv 2505.18231, section 3). So H is applied once to each query and to each sum, and a mean once
for each chunk. The token w of a chunk that starts at s is at p = s + w; with u = R(s) ~m, for each pair (a, b) of
rotated channels,

    <q, R(s + w) ~m> = sum of (q_a u_a + q_b u_b) cos(w t) + (q_b u_a - q_a u_b) sin(w t)  + the channels not rotated

whose cosines and sines are the same for all chunks.

Signed codewords (1 bit) are not even looked up for keys on a CPU: <H q, q_t> is a sum of d / 8 entries of a table of
the products of all codewords with all eighths of H q.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from quantkit.kv.codebooks import ENTRIES, WIDTH
from quantkit.kv.nsn_encode import Chunks, matrix
from quantkit.kv.nsn_store import View

_MOST_ROWS = 16
"""Queries of one head for which a table of products is made; it is made if there are at least 256 tokens for each."""


class NSNKeys:
    """A ``KeyReader``.

    Args:
        rows: queries, float32 or float64 [batch, heads, rows, head_dim].
    """

    def __init__(self, view: View, rows: Tensor) -> None:
        self._view, self._rows = view, rows
        self._turned = rows @ matrix(rows.shape[-1], rows.dtype, rows.device).mT  # H q
        self._table = _product_table(view, self._turned)
        rope = view.coder.rope
        self._waves: Tensor | None = None
        """[rotary_dim, W]: cosines, below them sines, of the tokens of a chunk."""
        if rope is not None:
            places = torch.arange(view.coder.window, device=rows.device)
            self._waves = torch.cat(rope.table(places, rows.dtype), dim=-1).mT

    def logits(self, first: int, last: int) -> Tensor:
        parts = []
        for part in _parts(self._view, first, last):
            if isinstance(part, Tensor):
                parts.append(self._rows @ part.to(self._rows.dtype).mT)
            else:
                start, stop, inside = part
                parts.append(self._coded(start, stop)[..., inside])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _coded(self, start: int, stop: int) -> Tensor:
        """Of chunks ``start`` to ``stop - 1``; [batch, heads, rows, tokens]."""
        view, dtype = self._view, self._rows.dtype
        assert view.chunks is not None
        chunks = view.chunks.part(start, stop)
        if self._table is None:
            found = view.coder.codebook.look_up(chunks.codes, chunks.signs, dtype).flatten(2, 3)
            products = self._turned @ found.mT
        else:
            products = _looked_up(self._table, chunks.codes)
        products = products.unflatten(-1, (stop - start, -1)) * chunks.gain.to(dtype)[:, :, None]
        if chunks.mean_codes is not None:
            products = products + self._with_means(chunks, view.starts[start:stop])
        return (products * view.coder.norms(chunks, dtype)[:, :, None]).flatten(-2)

    def _with_means(self, chunks: Chunks, starts: Tensor) -> Tensor:
        """<q, R(p_t) ~m> of every token, [batch, heads, rows, C, W]; W is 1 if it is the same for all."""
        rows, rope = self._rows, self._view.coder.rope
        means = self._view.coder.means(chunks, rows.dtype)
        if rope is None or self._waves is None:
            return (rows @ means.mT)[..., None]
        turned = rope.rotate(means, starts)
        (qa, qb), (ua, ub) = rope.pairs(rows[..., None, :]), rope.pairs(turned[:, :, None])
        waves = torch.cat([qa * ua + qb * ub, qb * ua - qa * ub], dim=-1) @ self._waves
        rest = rows[..., rope.rotary_dim :] @ turned[..., rope.rotary_dim :].mT
        return waves + rest[..., None]


class NSNValues:
    """A ``ValueReader``; its sums are those of the codewords, in front of H.T, and behind them those of the rest."""

    def __init__(self, view: View, dtype: torch.dtype) -> None:
        self._view, self._dtype = view, dtype

    def sums(self, weights: Tensor, first: int, last: int) -> Tensor:
        """[batch, heads, rows, 2 * head_dim]"""
        head_dim = self._view.tail.shape[-1]
        result = weights.new_zeros(*weights.shape[:3], 2 * head_dim)
        coded, plain = result.split(head_dim, dim=-1)
        at = 0
        for part in _parts(self._view, first, last):
            if isinstance(part, Tensor):
                count = part.shape[2]
                plain += weights[..., at : at + count] @ part.to(self._dtype)
            else:
                start, stop, inside = part
                count = inside.stop - inside.start
                self._add(weights[..., at : at + count], start, stop, inside, coded, plain)
            at += count
        return result

    def output(self, sums: Tensor) -> Tensor:
        coded, plain = sums.chunk(2, dim=-1)
        return coded @ matrix(coded.shape[-1], coded.dtype, coded.device) + plain

    def _add(self, weights: Tensor, start: int, stop: int, inside: slice, coded: Tensor, plain: Tensor) -> None:
        """Add tokens ``inside`` of those in chunks ``start`` to ``stop - 1``."""
        view, window = self._view, self._view.coder.window
        assert view.chunks is not None
        chunks = view.chunks.part(start, stop)
        tokens = (stop - start) * window
        if weights.shape[-1] < tokens:
            spread = weights.new_zeros(*weights.shape[:3], tokens)
            spread[..., inside] = weights
            weights = spread
        shares = weights.unflatten(-1, (stop - start, window)) * view.coder.norms(chunks, self._dtype)[:, :, None]
        found = view.coder.codebook.look_up(chunks.codes, chunks.signs, self._dtype).flatten(2, 3)
        coded += (shares * chunks.gain.to(self._dtype)[:, :, None]).flatten(-2) @ found
        if chunks.mean_codes is not None:
            plain += shares.sum(-1) @ view.coder.means(chunks, self._dtype)


def _parts(view: View, first: int, last: int) -> Iterator[Tensor | tuple[int, int, slice]]:
    """What tokens ``first`` to ``last - 1`` are held as, in their order: tensors [batch, heads, n, head_dim] as they
    came, or (first chunk, behind the last chunk, the wanted tokens of theirs)."""
    sink, window = view.sink.shape[2], view.coder.window
    packed = 0 if view.chunks is None else window * view.chunks.count
    if first < sink:
        yield view.sink[:, :, first:last]
    start, stop = max(0, first - sink), min(last - sink, packed)
    if start < stop:
        at = start // window
        yield at, -(-stop // window), slice(start - at * window, stop - at * window)
    if last > sink + packed:
        yield view.tail[:, :, max(0, first - sink - packed) : last - sink - packed]


def _product_table(view: View, turned: Tensor) -> Tensor | None:
    """Products of all codewords with all eighths of ``turned`` [batch, heads, rows, d]: [batch * heads * d / 8 * 256,
    rows]; None: it is better not made."""
    book, rows = view.coder.codebook, turned.shape[2]
    if book.bits != 1 or turned.device.type != "cpu" or view.chunks is None or rows > _MOST_ROWS:
        return None
    if rows * ENTRIES > view.chunks.count * view.coder.window:
        return None
    codewords = book.on(turned.device).to(turned.dtype)
    eighths = turned.unflatten(-1, (-1, WIDTH)).transpose(2, 3)  # [batch, heads, d / 8, rows, 8]
    products = eighths.reshape(-1, WIDTH) @ codewords.mT
    return products.view(-1, rows, ENTRIES).mT.flatten(0, 1)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """Sums of entries of ``table`` for ``codes`` [batch, heads, C, W, d / 8]; [batch, heads, rows, C * W]."""
    batch, heads, _, _, eighths = codes.shape
    firsts = torch.arange(0, len(table), ENTRIES, device=codes.device, dtype=torch.int32)
    places = codes.int() + firsts.view(batch, heads, 1, 1, eighths)
    return embedding_bag(places.view(-1, eighths), table, mode="sum").view(batch, heads, -1, table.shape[1]).mT
