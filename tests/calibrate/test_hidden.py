"""States on disk are those in memory, and nothing is left of them."""

from __future__ import annotations

import errno
import gc
from pathlib import Path
from typing import IO

import pytest
import torch

from quantkit.calibrate.hidden import HiddenStates
from quantkit.errors import QuantkitError


def filled(folder: Path, max_bytes: int | None, dtype: torch.dtype = torch.float32) -> HiddenStates:
    states = HiddenStates(7, 5, 6, batch_size=3, dtype=dtype, max_bytes=max_bytes, folder=folder)
    values = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    for number in range(len(states)):
        rows = states.samples(number)
        states.replace(number, values[rows.start : rows.stop])
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_disk_equals_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    with filled(tmp_path, None, dtype) as memory, filled(tmp_path, 0, dtype) as disk:
        assert (memory.on_disk, disk.on_disk) == (False, True)
        assert len(disk) == 3
        assert [list(disk.samples(number)) for number in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
        for states in memory, disk:
            states.replace(1, states.batch(1).float() * 2)  # out of order, as a block loop with a hold-out set might
        for number in 2, 0, 1:
            assert disk.batch(number).dtype == dtype
            assert torch.equal(disk.batch(number), memory.batch(number))


def test_the_limit_decides(tmp_path: Path) -> None:
    nbytes = 7 * 5 * 6 * 4
    assert not HiddenStates(7, 5, 6, batch_size=3, max_bytes=nbytes, folder=tmp_path).on_disk
    with HiddenStates(7, 5, 6, batch_size=3, max_bytes=nbytes - 1, folder=tmp_path) as states:
        assert states.on_disk
        assert states.nbytes == nbytes


def test_no_file_is_left(tmp_path: Path) -> None:
    states = filled(tmp_path, 0)
    assert not any(tmp_path.iterdir())  # not even while it is in use, so a killed process leaves none either
    with pytest.raises(KeyboardInterrupt), states:
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="closed"):
        states.batch(0)
    filled(tmp_path, 0)  # dropped without being closed
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_a_system_that_moves_a_few_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux moves no more than 2 GiB in one call."""
    states = filled(tmp_path, 0)
    whole: IO[bytes] = states._file

    class Slow:
        seek = whole.seek

        def readinto(self, data: memoryview) -> int:
            return whole.readinto(data[:7])

        def write(self, data: memoryview) -> int:
            return whole.write(data[:7])

    before = states.batch(1)
    monkeypatch.setattr(states, "_file", Slow())
    assert torch.equal(states.batch(1), before)
    states.replace(1, before * 2)
    assert torch.equal(states.batch(1), before * 2)


@pytest.mark.parametrize("max_bytes", [None, 0], ids=["memory", "disk"])
def test_a_batch_is_a_copy(max_bytes: int | None, tmp_path: Path) -> None:
    with filled(tmp_path, max_bytes) as states:
        before = states.batch(0)
        states.batch(0).zero_()
        assert torch.equal(states.batch(0), before)


@pytest.mark.parametrize("max_bytes", [None, 0], ids=["memory", "disk"])
def test_a_wrong_shape_is_refused(max_bytes: int | None, tmp_path: Path) -> None:
    with filled(tmp_path, max_bytes) as states, pytest.raises(ValueError, match=r"batch 2 is \(1, 5, 6\), got \(3, 5"):
        states.replace(2, torch.zeros(3, 5, 6))


def test_made_in_inference_mode_and_used_outside(tmp_path: Path) -> None:
    with torch.inference_mode():
        states = filled(tmp_path, None)
    states.replace(0, torch.ones(3, 5, 6))
    assert not states.batch(0).is_inference()


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    states = filled(tmp_path, 0)
    monkeypatch.setattr(states, "_file", Full())
    with pytest.raises(QuantkitError, match=r"0\.0 GiB cannot be written to disk: No space left.* smaller --nsamples"):
        states.replace(0, torch.zeros(3, 5, 6))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"cannot be kept in .*missing: No such file or directory; free some space"):
        HiddenStates(7, 5, 6, batch_size=3, max_bytes=0, folder=tmp_path / "missing")
