"""Whether Triton is there, and its parts.

Nothing here or in ``weight_only.py`` loads Triton before a kernel is launched or compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

AVAILABLE = importlib.util.find_spec("triton") is not None


def module(name: str = "") -> Any:
    """Triton itself, or a part of it: ``module("testing")``."""
    return importlib.import_module(f"triton.{name}" if name else "triton")
