"""What kernels are written with: ``jit`` and ``constexpr_function`` of Triton and its language ``tl``.

Where Triton is missing, modules with kernels can be imported all the same, and their kernels cannot be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantkit.kernels.triton import compat

tl: Any = compat.module("language") if compat.AVAILABLE else None


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return _as_it_is if function is None else function


jit: Any = compat.module().jit if compat.AVAILABLE else _as_it_is
constexpr_function: Any = compat.module().constexpr_function if compat.AVAILABLE else _as_it_is
"""Runs while a kernel is compiled, on constants."""
