"""Triton's interpreter for the tests that ask for it; everything else in the process keeps the compiled functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

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
