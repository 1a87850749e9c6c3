"""Moving a transform of a site into its producer and its consumers, so that nothing is left to do at inference.

    y = C @ signal + b   becomes   y = (C / t) @ (signal * t) + b          t: [signal width], t > 0
                         or        y = C @ (signal - z) + (b + C @ z)      z: [signal width]
                         or        y = (C @ M**-T) @ (M.T @ signal) + b    M: [head_dim, head_dim] per key/value head

and q @ k = (q * s) @ (k / s) for queries and keys. The arithmetic is done in float64. A tensor that is stored as it
stands, a norm's weight or bias or a linear that stays unquantised, is rounded to its stored dtype here, and the
consumers make up for what the rounded producer really does: the pair stays exact however often it is folded.

A site of kind none has no producer that could change: only the consumers are rewritten, and the caller has to put
x * t + c in front of them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from quantkit.models.block import Block, QueryKey, Site
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
        could be scaled. For kind none it is left to the caller to apply it.
    """
    applied = t.double()
    if site.kind == "norm":
        applied = _scale_norm(block, site, applied)
    elif site.kind == "linear":
        applied = _scale_rows(block, site, applied, quantised)
    columns = consumer_columns(site, applied)
    for consumer in site.consumers:
        divide_columns(block.weight(consumer), columns)
    return applied


def apply_shift(block: Block, site: Site, z: Tensor) -> Tensor:
    """Subtract ``z`` from the signal of ``site`` and make up for it in every consumer's bias, in place in ``block``.

    Fold a scale before a shift, not behind it: it leaves a bias in the producer that is rounded when it is stored, and
    only here do the consumers make up for that.

    Args:
        block: the tensors that are rewritten; the function it computes does not change.
        site: where; ``shift_obstacle`` sees none there.
        z: [signal width], in units of the signal as it is now.

    Returns:
        The shift applied, float64 [signal width]: ``z`` up to the rounding of the producer's bias to its stored dtype.
        For kind none it is left to the caller to apply it.

    Raises:
        ValueError: there is an obstacle.
    """
    if obstacle := shift_obstacle(block, site):
        raise ValueError(f"{block.prefix}: no shift can be folded at {site.name}: {obstacle}")
    applied = z.double()
    if site.kind != "none":
        name, rows = f"{site.producer}.bias", slice(None) if site.rows is None else site.rows
        before = block.tensors[name][rows].clone().double()
        _write(block, name, (before - applied).to(block.stored_dtypes[name]).double(), rows)
        applied = before - block.tensors[name][rows].double()
    columns = consumer_columns(site, applied)
    for consumer in site.consumers:
        bias, weight = f"{consumer}.bias", block.weight(consumer)
        _write(block, bias, block.tensors[bias].double() + _product(weight, columns))
    return applied


def shift_obstacle(block: Block, site: Site) -> str | None:
    """Why no shift can be folded at ``site``, in a few words; None: it can. Biases are never created."""
    if site.kind == "linear" and not site.head_dim:  # attention weights sum to 1: they pass a constant on
        return f"a constant added to {site.producer} does not pass the activation or product behind it"
    if site.kind != "none" and f"{site.producer}.bias" not in block.tensors:
        return f"{site.producer} has no bias"
    lacking = next((name for name in site.consumers if f"{name}.bias" not in block.tensors), None)
    return f"{lacking} has no bias" if lacking else None


def apply_matrix(block: Block, site: Site, matrix: Tensor) -> None:
    """Multiply the signal of a v -> o site by ``matrix`` (from the right) and undo it in the consumer, in place.

    Nothing can make up for the rounding of a producer that stays unquantised, nor for that of its bias: both are left
    to whoever stores them.

    Args:
        block: the tensors that are rewritten; the function it computes does not change.
        site: where.
        matrix: [kv_heads, head_dim, head_dim], or [head_dim, head_dim] for all heads; invertible.

    Raises:
        ValueError: ``site`` is no v -> o site, or the matrix is not of one of these shapes.
        torch.linalg.LinAlgError: the matrix is singular; nothing was changed.
    """
    if not site.head_dim:
        raise ValueError(f"{block.prefix}: only v -> o sites take a matrix, {site.name} is none")
    weight, rows = f"{site.producer}.weight", slice(None) if site.rows is None else site.rows
    producer = block.tensors[weight][rows].double().unflatten(0, (-1, site.head_dim))  # [kv_heads, head_dim, in]
    heads = len(producer)
    if matrix.shape[-2:] != (site.head_dim,) * 2 or matrix.shape[:-2] not in ((), (heads,)):
        raise ValueError(
            f"{site.name} takes a matrix [{heads}, {site.head_dim}, {site.head_dim}] or one for all "
            f"heads, got {list(matrix.shape)}"
        )
    matrix = matrix.double().expand(heads, -1, -1)
    lu, pivots, failed = torch.linalg.lu_factor_ex(matrix)
    if failed.any():
        raise torch.linalg.LinAlgError(
            f"{block.prefix}{site.name}: the matrix of head {int(failed.argmax())} is singular"
        )
    _write(block, weight, (matrix.mT @ producer).flatten(0, 1), rows)
    bias = f"{site.producer}.bias"
    if bias in block.tensors:
        value = block.tensors[bias][rows].double().unflatten(0, (heads, 1, site.head_dim))
        _write(block, bias, (value @ matrix).flatten(), rows)
    for consumer in site.consumers:
        _undo_matrix(block.weight(consumer), site, (lu, pivots))


def apply_qk_scale(block: Block, pair: QueryKey, t: Tensor) -> None:
    """Multiply the queries by ``t`` and divide the keys by it, in place in ``block``.

    Nothing can make up for the rounding of what is stored as it stands (norms, biases): it is left to whoever stores
    it. Powers of two need none, but in norms with an offset.

    Args:
        block: the tensors that are rewritten; the function it computes does not change.
        pair: where.
        t: [``pair.width``], positive.
    """
    keys = t.double()[pair.tie]
    queries = keys.unflatten(0, (-1, 1, pair.head_dim)).expand(-1, pair.repeats, -1).flatten()
    _scale_channels(block, pair.query, pair.query_rows, queries, pair.norm_offset)
    _scale_channels(block, pair.key, pair.key_rows, keys.reciprocal(), pair.norm_offset)


def divide_columns(weight: Tensor, t: Tensor) -> None:
    """``weight`` [rows, columns] / ``t`` [columns], in place; float64 arithmetic, a chunk of rows at a time."""
    inverse = t.double().reciprocal()
    by_rows(lambda chunk: weight[chunk].mul_(inverse), *weight.shape)


def consumer_columns(site: Site, signal: Tensor) -> Tensor:
    """``signal``, one value per signal channel, as one value per input column of the consumers (grouped heads)."""
    if site.repeats == 1:
        return signal
    return signal.unflatten(0, (-1, 1, site.head_dim)).expand(-1, site.repeats, -1).flatten()


def _product(weight: Tensor, vector: Tensor) -> Tensor:
    """``weight`` [rows, columns] @ ``vector`` [columns] in float64, a chunk of rows at a time."""
    return torch.cat(by_rows(lambda chunk: weight[chunk].double() @ vector, *weight.shape))


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


def _undo_matrix(weight: Tensor, site: Site, factors: tuple[Tensor, Tensor]) -> None:
    """``weight`` [rows, columns] @ M**-T per head, in place; ``factors``: LU of M [kv_heads, head_dim, head_dim]."""

    def undo(chunk: slice) -> None:
        part = weight[chunk].double().unflatten(1, (-1, site.repeats, site.head_dim))
        by_head = part.movedim(1, 0).flatten(1, 2)  # [kv_heads, rows * repeats, head_dim]
        solved = torch.linalg.lu_solve(*factors, by_head, left=False, adjoint=True)
        weight[chunk] = solved.unflatten(1, (-1, site.repeats)).movedim(0, 1).flatten(1).to(weight.dtype)

    by_rows(undo, *weight.shape)


def _scale_channels(block: Block, module: str, rows: Tensor | None, factor: Tensor, offset: float) -> None:
    """Multiply output channels of a linear or norm by ``factor``; ``offset``: of a norm's weight."""
    part = slice(None) if rows is None else rows
    weight, bias = f"{module}.weight", f"{module}.bias"
    values = block.tensors[weight][part].double()
    column = factor if values.dim() == 1 else factor[:, None]
    # Not (offset + values) * column - offset, which rounds even where the factor is 1.
    _write(block, weight, values * column + offset * (column - 1), part)
    if bias in block.tensors:
        _write(block, bias, block.tensors[bias][part].double() * factor, part)


def _write(block: Block, name: str, values: Tensor, rows: Tensor | slice = slice(None)) -> None:
    """Put float64 ``values`` into (rows of) a working copy."""
    block.tensors[name][rows] = values.to(block.tensors[name].dtype)
