"""What a figure was measured with; stands in every file of ``eval/results``."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import quantkit


def environment() -> dict[str, str]:
    """Versions and machine."""
    import torch
    import transformers

    return {
        "quantkit": quantkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
