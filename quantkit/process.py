"""What this process takes: time and memory."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from pathlib import Path

import psutil


class Clock:
    """Stands at zero when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> dict[str, float]:
        """Seconds since then, and those that this process computed, all threads together: they depend less on what
        else the machine does."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}


def give_back_memory() -> None:
    """Hand freed memory back to the system: what glibc keeps in its arenas would add up from block to block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)


def rss() -> int:
    """Resident set of this process, bytes."""
    return psutil.Process().memory_info().rss


def peak_rss() -> int:
    """Largest resident set of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux begins with the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
