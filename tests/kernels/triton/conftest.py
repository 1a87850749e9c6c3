"""Triton's interpreter for the tests that ask for it; everything else in the process keeps the compiled functions."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from quantkit.kernels.triton import compat, weight_only, weight_only_kernels


@pytest.fixture(scope="session")
def interpreted_kernels() -> ModuleType:
    """``weight_only_kernels`` loaded again, for the interpreter: it is chosen when functions are decorated."""
    if not compat.AVAILABLE:
        pytest.skip("needs triton")
    spec = importlib.util.spec_from_file_location("interpreted_weight_only_kernels", weight_only_kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreter(interpreted_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Launches on CPU tensors run in the interpreter."""
    monkeypatch.setattr(weight_only, "_kernels", lambda: interpreted_kernels)
    return interpreted_kernels
