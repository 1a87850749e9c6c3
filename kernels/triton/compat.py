"""Whether Triton is there, and its parts.

Nothing here or in ``weight_only.py`` loads Triton before a kernel is launched or compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from quantkit.kernels.lacking import Lacking

AVAILABLE = importlib.util.find_spec("triton") is not None
MISSING = Lacking("triton is not installed")


def module(name: str = "") -> Any:
    """Triton itself, or a part of it: ``module("testing")``."""
    return importlib.import_module(f"triton.{name}" if name else "triton")


def version() -> str:
    """Major and minor (``3.5``); empty where Triton is not there."""
    return ".".join(str(module().__version__).split(".")[:2]) if AVAILABLE else ""
