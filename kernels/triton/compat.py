"""Triton where it is installed. Every module of this folder imports without it; only a launch needs it.

Kernels are decorated with ``jit`` and use ``tl`` as they would Triton's own; both are stand-ins where Triton is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

AVAILABLE = importlib.util.find_spec("triton") is not None

triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return _as_it_is if function is None else function


jit: Any = triton.jit if AVAILABLE else _as_it_is
constexpr_function: Any = triton.constexpr_function if AVAILABLE else _as_it_is
"""Runs while a kernel is compiled, on constants."""
