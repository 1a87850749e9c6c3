"""Walking a weight matrix by groups of input columns, in row chunks that stay in cache, without copying it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quantkit.recipe import PER_CHANNEL

CHUNK_ELEMENTS = 1 << 19
"""Elements per row chunk, 2 MiB of float32: large enough that the cost of a call does not count, small enough that a
chunk and its scratch stay in a shared cache. Best of a sweep from 2**13 to 2**20; a quarter of it costs 25 %."""


def group_views(matrix: Tensor, group_size: int) -> list[Tensor]:
    """Views of ``matrix`` [rows, columns] as [rows, groups, width]: the full groups, then a short last one if any."""
    columns = matrix.shape[1]
    width = columns if group_size == PER_CHANNEL else min(group_size, columns)
    whole = columns - columns % width
    views = [matrix[:, :whole].unflatten(1, (-1, width))]
    if whole < columns:
        views.append(matrix[:, whole:].unsqueeze(1))
    return views


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of ``columns``; a short last group counts."""
    return 1 if group_size == PER_CHANNEL else -(-columns // group_size)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows``, each with about CHUNK_ELEMENTS elements."""
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
