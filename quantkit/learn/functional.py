"""The folds of ``transforms/fold.py`` with gradients: new tensors instead of a rewritten block.

What is computed is what the fold leaves where nothing is rounded to a stored dtype, in the arithmetic of the tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.models.block import QueryKey, Site
from quantkit.transforms.fold import consumer_columns

Tensors = dict[str, Tensor]
"""Tensor name in the block -> value."""


def fold_site(tensors: Tensors, site: Site, t: Tensor, z: Tensor | None, consumers: tuple[str, ...]) -> None:
    """The signal of ``site`` becomes (signal - z) * t, in ``tensors``: entries are replaced, values stay as they are.

    A channel that a norm makes zero of is scaled as if it had another weight: nothing comes of it.

    Args:
        t: [signal width], positive.
        z: [signal width]; None: 0. Only where ``fold.shift_obstacle`` sees none.
        consumers: those that make up for it: all of the site's; for kind none those whose input is changed.
    """
    if z is not None:
        columns = consumer_columns(site, z)
        for name in consumers:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + tensors[f"{name}.weight"] @ columns
    columns = consumer_columns(site, t)
    if site.kind != "none":
        _change_rows(tensors, site.producer, site.rows, t, site.norm_offset, z)
    for name in consumers:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] / columns


def fold_matrix(tensors: Tensors, site: Site, matrix: Tensor, undo: Tensor) -> None:
    """The signal of a v -> o site is multiplied by ``matrix`` from the right, in ``tensors``.

    Args:
        matrix: [kv_heads, head_dim, head_dim].
        undo: [kv_heads, head_dim, head_dim], matrix**-T: what the columns of the consumers are multiplied by.
    """
    rows = None if site.rows is None else site.rows.clone()  # of inference mode, perhaps
    for name in (f"{site.producer}.weight", f"{site.producer}.bias"):
        if name in tensors:
            part = tensors[name] if rows is None else tensors[name][rows]
            by_head = part.reshape(len(matrix), site.head_dim, -1)  # [kv_heads, head_dim, in, or 1 for a bias]
            changed = (matrix.mT @ by_head).reshape(part.shape)
            tensors[name] = changed if rows is None else tensors[name].index_copy(0, rows, changed)
    for consumer in site.consumers:
        weight = tensors[f"{consumer}.weight"].unflatten(1, (len(undo), site.repeats, site.head_dim))
        tensors[f"{consumer}.weight"] = torch.einsum("ohrd,hde->ohre", weight, undo).flatten(1)


def fold_query_key(tensors: Tensors, pair: QueryKey, t: Tensor) -> None:
    """Queries times ``t`` [``pair.width``], keys divided by it, in ``tensors``."""
    keys = t[pair.tie.clone()]  # of inference mode, perhaps
    queries = keys.unflatten(0, (-1, 1, pair.head_dim)).expand(-1, pair.repeats, -1).flatten()
    _change_rows(tensors, pair.query, pair.query_rows, queries, pair.norm_offset)
    _change_rows(tensors, pair.key, pair.key_rows, keys.reciprocal(), pair.norm_offset)


def transposed_inverse(undo: Tensor) -> Tensor:
    """``undo`` [heads, n, n] ** -T: what row vectors are multiplied by; NaN where there is none."""
    inverse, failed = torch.linalg.inv_ex(undo)
    return inverse.mT.where((failed == 0)[:, None, None], math.nan)


def _change_rows(
    tensors: Tensors, module: str, rows: Tensor | None, t: Tensor, offset: float, z: Tensor | None = None
) -> None:
    """What ``rows`` of a linear or a norm put out, y, becomes (y - z) * t; ``offset``: of a norm's weight."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    width = len(tensors[weight])
    factor = _placed(t, rows, torch.ones(width, dtype=t.dtype))
    column = factor if tensors[weight].dim() == 1 else factor[:, None]
    tensors[weight] = tensors[weight] * column + offset * (column - 1)
    if z is not None:
        tensors[bias] = tensors[bias] - _placed(z, rows, torch.zeros(width, dtype=z.dtype))
    if bias in tensors:
        tensors[bias] = tensors[bias] * factor


def _placed(values: Tensor, rows: Tensor | None, rest: Tensor) -> Tensor:
    """``values`` at ``rows`` of a vector that is ``rest`` elsewhere."""
    # A copy of the rows: a tensor of inference mode cannot be kept for the way back.
    return values if rows is None else rest.index_copy(0, rows.clone(), values)
