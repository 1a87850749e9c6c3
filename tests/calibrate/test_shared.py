"""Runs of a sweep take their calibration samples from one folder, and what they write is what it would be without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate import session
from quantkit.calibrate.shared import shared_windows
from quantkit.pipeline import quantize
from quantkit.recipe import Calibration

GENERATED = {"source": "generated", "nsamples": 4, "seqlen": 12}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source of every set of samples that is made from now on."""
    sources: list[str] = []
    whole = session.token_windows

    def token_windows(settings: Calibration, *args: Any, **options: Any) -> Tensor:
        sources.append(settings.source)
        return whole(settings, *args, **options)

    monkeypatch.setattr(session, "token_windows", token_windows)
    return sources


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_checkpoints_are_the_same_to_the_byte(
    source: Callable[..., Path], tmp_path: Path, made: list[str], method: str
) -> None:
    settings: dict[str, Any] = {"method": method, "scheme": "W3A16G32", "calibration": GENERATED}
    quantize(str(source("llama")), output=tmp_path / "alone", **settings)
    for name in ("first", "second"):
        quantize(str(source("llama")), output=tmp_path / name, shared=tmp_path / "shared", **settings)
    assert made == ["generated"] * 2  # alone and first
    alone, first, second = (weights(tmp_path / name) for name in ("alone", "first", "second"))
    assert alone
    assert alone == first == second


def test_a_rotation_is_learned_from_the_samples_of_the_run(
    source: Callable[..., Path], tmp_path: Path, made: list[str]
) -> None:
    recipe = {
        "steps": [{"method": "hadamard", "options": {"residual": "always", "learn_steps": 2}}, "gptq"],
        "scheme": "W4A4",
        "calibration": GENERATED,
    }
    quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe)
    assert made == ["generated"]


def test_other_settings_and_other_models_have_other_samples(source: Callable[..., Path], tmp_path: Path) -> None:
    settings, numbers = Calibration(nsamples=2, seqlen=4), iter(range(9))

    def make() -> Tensor:
        return torch.full((2, 4), next(numbers))

    def number(name: str, **changes: Any) -> int:
        wanted = settings.model_copy(update=changes)
        return int(shared_windows(tmp_path / "shared", source(name), wanted, make).unique())

    assert [number("llama"), number("llama", seed=1), number("llama", source="generated"), number("qwen2")] == [
        0, 1, 2, 3,
    ]  # fmt: skip
    assert number("llama") == 0
    assert next(numbers) == 4


def test_what_failed_or_was_cut_short_is_made_again(source: Callable[..., Path], tmp_path: Path) -> None:
    settings, wanted = Calibration(nsamples=2, seqlen=4), torch.arange(8).view(2, 4)

    def fail() -> Tensor:
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        shared_windows(tmp_path, source("llama"), settings, fail)
    (lock,) = tmp_path.glob("*.lock")
    lock.with_suffix(".tmp").write_bytes(b"half of a file")  # of a process that was killed
    assert torch.equal(shared_windows(tmp_path, source("llama"), settings, lambda: wanted), wanted)
    assert torch.equal(shared_windows(tmp_path, source("llama"), settings, fail), wanted)


def test_of_several_that_ask_at_once_one_makes_them(source: Callable[..., Path], tmp_path: Path) -> None:
    folder, made, found = source("llama"), [], []

    def make() -> Tensor:
        made.append(threading.get_ident())
        time.sleep(0.2)
        return torch.arange(8).view(2, 4)

    def ask() -> None:
        found.append(shared_windows(tmp_path, folder, Calibration(nsamples=2, seqlen=4), make))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(torch.equal(one, torch.arange(8).view(2, 4)) for one in found)
    assert len(found) == 4
