"""Shared fixtures: tiny models of every architecture, saved once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer

from quantkit.kernels import dispatch

torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose a lot on a busy machine


@pytest.fixture(scope="session", autouse=True)
def _to_the_last_digit() -> Iterator[None]:
    """Tests may compare digit by digit what the kernels of this or that machine round differently."""
    with dispatch.only_reference():
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run quantised layers as a user's machine does: ``pytest.mark.usefixtures("kernels")``."""
    monkeypatch.setattr(dispatch, "_only_reference", False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(name, dtype=torch.float32)`` -> folder of that tiny model, not to be written to."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in folders:
            folders[name, dtype] = tmp_path_factory.mktemp(name)
            save_tiny(name, folders[name, dtype], dtype)
        return folders[name, dtype]

    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``source(name, dtype=torch.float32)`` -> folder of that tiny model with a tokenizer, not to be written to."""
    root = tmp_path_factory.mktemp("sources")

    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{name}-{dtype}"
        if not path.exists():
            save_tiny(name, path, dtype, vocab_size=VOCABULARY)
            save_tokenizer(path)
        return path

    return folder
