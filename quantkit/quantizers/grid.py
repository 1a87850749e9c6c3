"""Walking a weight matrix by groups of input columns, in row chunks that stay in cache, without copying it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.recipe import PER_CHANNEL

CHUNK_ELEMENTS = 1 << 18
"""Elements per row chunk, 1 MiB of float32: large enough that the cost of a call hardly counts, small enough that a
chunk and its scratch stay in a shared cache and are not handed back to the system between chunks (page faults cost
ten times the arithmetic). Of 2**15 to 2**20; 2**19 is 10 % faster on large matrices and much slower on small ones."""

Result = TypeVar("Result")

_threads: ContextVar[int] = ContextVar("threads", default=0)
"""Threads for chunks while operations are serial; 0 otherwise."""


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


@contextmanager
def serial_operations() -> Iterator[int]:
    """Inside, every operation runs on one thread; yields how many threads there are for ``by_rows``.

    An operation on several threads ends with all of them waiting for the last. On a machine with other work that wait
    is a time slice of the scheduler, many times the arithmetic, even for a vector (logarithms are threaded too).
    """
    if _threads.get():
        yield _threads.get()
        return
    threads = torch.get_num_threads()
    before = _threads.set(threads)
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
        _threads.reset(before)


def by_rows(work: Callable[[slice], Result], rows: int, columns: int) -> list[Result]:
    """``work`` on slices that cover ``rows``, about CHUNK_ELEMENTS elements each; the results in order.

    The chunks run side by side, each on one thread, so a result does not depend on the number of threads.
    """
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    inference = torch.is_inference_mode_enabled()

    def run(chunk: slice) -> Result:
        with torch.inference_mode(inference):  # the mode belongs to a thread
            return work(chunk)

    with serial_operations() as threads:  # what is set here is what new threads start with
        if min(threads, len(chunks)) <= 1:
            return [work(chunk) for chunk in chunks]
        with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
            return list(pool.map(run, chunks))
