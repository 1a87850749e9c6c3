"""Walking a matrix by groups and row chunks: views, not copies; every row once; nothing left changed behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from quantkit.quantizers import grid


@pytest.mark.parametrize("columns", [1, 7, 64, 100, 128])
@pytest.mark.parametrize("group_size", [8, 64, -1])
def test_group_views_are_the_columns_in_order(columns: int, group_size: int) -> None:
    matrix = torch.arange(3.0 * columns).view(3, columns)
    views = grid.group_views(matrix, group_size)
    assert torch.equal(torch.cat([view.flatten(1) for view in views], dim=1), matrix)
    assert sum(view.shape[1] for view in views) == grid.group_count(columns, group_size)
    assert all(view.shape[2] == min(group_size, columns) for view in views[:1] if 0 < group_size <= columns)
    for view in views:
        view += 1
    assert torch.equal(matrix, torch.arange(3.0 * columns).view(3, columns) + 1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (100, 64), (101, 64), (3, 10**6), (0, 5)])
def test_every_row_is_visited_once_and_in_order(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 1000)
    chunks = grid.by_rows(lambda chunk: chunk, rows, columns)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert all((chunk.stop - chunk.start) * columns <= max(1000, columns) for chunk in chunks)


@pytest.mark.usefixtures("two_threads")
def test_chunks_run_on_one_thread_each_in_the_callers_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 10)

    def look(chunk: slice) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert set(grid.by_rows(look, 40, 5)) == {(1, False)}
    with torch.inference_mode():
        assert set(grid.by_rows(look, 40, 5)) == {(1, True)}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_serial_operations_leave_the_threads_to_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 10)
    together = threading.Barrier(2, timeout=10)
    with grid.serial_operations():
        assert torch.get_num_threads() == 1
        grid.by_rows(lambda chunk: together.wait(), 4, 5)  # would break if the two chunks ran one after the other
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_comes_through_and_restores_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 10)
    with pytest.raises(ZeroDivisionError):
        grid.by_rows(lambda chunk: 1 // chunk.start, 40, 5)
    assert torch.get_num_threads() == 2
