"""Triton's interpreter, or an H200 to compile for, for the tests that ask for one; everything else in the process keeps
the compiled functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from quantkit.kernels.triton import (
    activation,
    activation_kernels,
    compat,
    fused,
    fused_kernels,
    heads,
    heads_kernels,
    integer_kernels,
    kv_attention,
    kv_attention_kernels,
    kv_encode,
    kv_encode_kernels,
    transforms,
    transforms_kernels,
    weight_only,
    weight_only_kernels,
)


def _interpreted(kernels: ModuleType) -> ModuleType:
    """``kernels`` loaded again, for the interpreter: it is chosen when functions are decorated."""
    if not compat.AVAILABLE:
        pytest.skip("needs triton")
    spec = importlib.util.spec_from_file_location(f"interpreted_{kernels.__name__}", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def interpreted_kernels() -> ModuleType:
    """``weight_only_kernels``"""
    return _interpreted(weight_only_kernels)


@pytest.fixture(scope="session")
def interpreted_integer_kernels() -> ModuleType:
    """``integer_kernels``"""
    return _interpreted(integer_kernels)


@pytest.fixture
def interpreter(interpreted_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Launches on CPU tensors run in the interpreter."""
    monkeypatch.setattr(weight_only, "_kernels", lambda: interpreted_kernels)
    return interpreted_kernels


@pytest.fixture(scope="session")
def interpreted_input_kernels() -> dict[ModuleType, ModuleType]:
    """Launcher -> its kernels for the interpreter; those of ``activation`` are parts of the others."""
    loaded = {}
    with pytest.MonkeyPatch.context() as patch:
        for launcher, kernels in (
            (activation, activation_kernels),
            (transforms, transforms_kernels),
            (fused, fused_kernels),
            (heads, heads_kernels),
        ):
            loaded[launcher] = _interpreted(kernels)
            patch.setitem(sys.modules, kernels.__name__, loaded[launcher])  # what is imported next takes its functions
    return loaded


@pytest.fixture
def interpreted_language(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in the interpreter can take maxima, minima and sums."""
    if not compat.AVAILABLE:
        pytest.skip("needs triton")
    language, interpreter = compat.module("language"), compat.module("runtime.interpreter")
    # Functions of Triton's own, which were decorated before anyone asked for the interpreter. Called in it they leave
    # its versions in the language, and nothing would compile any more.
    places = (language, language.core, language.core.tensor, language.core.tensor_descriptor_base, language.math)
    before = [dict(vars(place)) for place in places]
    for name in ("max", "min", "sum"):
        monkeypatch.setattr(language, name, interpreter.InterpretedFunction(getattr(language, name).fn))
    yield
    for place, names in zip(places, before, strict=True):
        for name in vars(place).keys() - names.keys():
            delattr(place, name)
        for name, value in names.items():
            if vars(place)[name] is not value:
                setattr(place, name, value)


@pytest.fixture
def interpreted_inputs(
    interpreted_input_kernels: dict[ModuleType, ModuleType],
    interpreted_language: None,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[ModuleType, ModuleType]:
    """Launches of what changes and rounds inputs run in the interpreter, on CPU tensors."""
    for launcher, kernels in interpreted_input_kernels.items():
        monkeypatch.setattr(launcher, "_kernels", lambda kernels=kernels: kernels)
    return interpreted_input_kernels


@pytest.fixture(scope="session")
def interpreted_kv_attention_kernels() -> ModuleType:
    """``kv_attention_kernels``"""
    return _interpreted(kv_attention_kernels)


@pytest.fixture
def interpreted_kv_attention(
    interpreted_kv_attention_kernels: ModuleType, interpreted_language: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over packed keys and values runs in the interpreter, on CPU tensors."""
    monkeypatch.setattr(kv_attention, "_kernels", lambda: interpreted_kv_attention_kernels)


@pytest.fixture(scope="session")
def interpreted_kv_encode_kernels() -> ModuleType:
    """``kv_encode_kernels``"""
    return _interpreted(kv_encode_kernels)


@pytest.fixture
def interpreted_kv_encode(
    interpreted_kv_encode_kernels: ModuleType, interpreted_language: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are packed in the interpreter, on CPU tensors."""
    monkeypatch.setattr(kv_encode, "_kernels", lambda: interpreted_kv_encode_kernels)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a launch makes starts as NaN, or a large number: an element that is not written shows."""
    new_empty = Tensor.new_empty

    def poison(self: Tensor, *args: Any, **options: Any) -> Tensor:
        fresh = new_empty(self, *args, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max // 3)

    monkeypatch.setattr(Tensor, "new_empty", poison)


@pytest.fixture
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run compiled is not looked at."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


class Launch(NamedTuple):
    """A launch that was compiled and not run."""

    name: str
    grid: tuple[int, ...]
    compiled: Any


@pytest.fixture
def compiled_only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """A function (module, *names of kernels in it): they compile for an H200 when they are launched, with the arguments
    as they are on a GPU, and stop there. Every call returns the one list of all launches."""
    launches: list[Launch] = []
    monkeypatch.setattr(compat.module("runtime.driver").driver, "_active", _H200(), raising=False)

    def replace(module: ModuleType, *names: str) -> list[Launch]:
        for name in names:
            monkeypatch.setattr(module, name, _Compiled(getattr(module, name), launches))
        return launches

    return replace


class _H200:
    """As much of a driver as a launch asks before it has something to run."""

    def get_current_target(self) -> Any:
        return compat.module("backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


_ON_GPU = {"INTERPRETED": False, "RECIPROCAL": True, "PTX": True}
"""What launchers decide by where their tensors are."""


class _Compiled:
    """``kernel[grid](...)`` that compiles for what it is given, and stops there."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            options |= {name: value for name, value in _ON_GPU.items() if name in options}
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.launches.append(Launch(self.kernel.__name__, grid, compiled))

        return launch
