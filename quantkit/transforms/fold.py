"""Moving a transform of a site into its producer and its consumers, so that nothing is left to do at inference.

    y = C @ signal   becomes   y = (C / t) @ (signal * t)        t: [signal width], t > 0

The arithmetic is done in float64. A tensor that is stored as it stands, a norm's weight or a linear that stays
unquantised, is rounded to its stored dtype here, and the consumers are divided by the factor the rounded producer
really applies: the pair stays exact however often it is folded.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from quantkit.models.block import Block, Site
from quantkit.quantizers.grid import by_rows


def apply_scale(block: Block, site: Site, t: Tensor, quantised: Collection[str]) -> Tensor:
    """Multiply the signal of ``site`` by ``t`` and undo it in every consumer, in place in ``block``.

    Args:
        block: the tensors that are rewritten; the function it computes does not change.
        site: where; its producer and consumers are tensors of ``block``.
        t: [signal width], positive.
        quantised: linears of the block that are quantised later; other producers are rounded to their stored dtype.

    Returns:
        The factor applied, float64 [signal width]: ``t`` up to that rounding; 1 where the producer emits nothing that
        could be scaled.
    """
    t = t.double()
    applied = _scale_norm(block, site, t) if site.kind == "norm" else _scale_rows(block, site, t, quantised)
    columns = consumer_columns(site, applied)
    for consumer in site.consumers:
        divide_columns(block.weight(consumer), columns)
    return applied


def divide_columns(weight: Tensor, t: Tensor) -> None:
    """``weight`` [rows, columns] / ``t`` [columns], in place; float64 arithmetic, a chunk of rows at a time."""
    inverse = t.double().reciprocal()
    by_rows(lambda chunk: weight[chunk].mul_(inverse), *weight.shape)


def consumer_columns(site: Site, signal: Tensor) -> Tensor:
    """``signal``, one value per signal channel, as one value per input column of the consumers (grouped heads)."""
    if site.repeats == 1:
        return signal
    return signal.unflatten(0, (-1, 1, site.head_dim)).expand(-1, site.repeats, -1).flatten()


def _scale_norm(block: Block, site: Site, t: Tensor) -> Tensor:
    """Multiply weight and bias of a norm; a channel whose weight is or becomes zero is left alone."""
    name, bias = f"{site.producer}.weight", f"{site.producer}.bias"
    gain = block.tensors[name].double() + site.norm_offset
    stored = (gain * t - site.norm_offset).to(block.stored_dtypes[name]).double()
    applied = (stored + site.norm_offset) / gain
    usable = applied.isfinite() & (applied > 0)
    _write(block, name, torch.where(usable, stored, gain - site.norm_offset))
    applied = torch.where(usable, applied, 1.0)
    if bias in block.tensors:
        _write(block, bias, block.tensors[bias].double() * applied)
    return applied


def _scale_rows(block: Block, site: Site, t: Tensor, quantised: Collection[str]) -> Tensor:
    """Multiply the output rows of a linear that carry the signal."""
    name, bias = f"{site.producer}.weight", f"{site.producer}.bias"
    rows = torch.arange(t.numel()) if site.rows is None else site.rows
    before = block.tensors[name][rows].double()
    after = before * t[:, None]
    applied = t
    if site.producer not in quantised:
        # Rounded weight by weight, so no single factor is exact: the least-squares one.
        after = after.to(block.stored_dtypes[name]).double()
        fitted = (after * before).sum(1) / before.square().sum(1)
        applied = torch.where(fitted.isfinite() & (fitted > 0), fitted, t)
    _write(block, name, after, rows)
    if bias in block.tensors:
        _write(block, bias, block.tensors[bias][rows].double() * applied, rows)
    return applied


def _write(block: Block, name: str, values: Tensor, rows: Tensor | slice = slice(None)) -> None:
    """Put float64 ``values`` into (rows of) a working copy."""
    block.tensors[name][rows] = values.to(block.tensors[name].dtype)
