"""Which tile a weight-only product runs with: a table by device class and rows, or, on request, what was measured.

``QUANTKIT_AUTOTUNE=1`` times a few candidates the first time a (device, format, shape, rows) is met, outside of graph
capture, and keeps the fastest in memory and in $XDG_CACHE_HOME/quantkit. Rows are rounded up to a bucket first, so one
decision serves every call of a captured graph's size.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

VERSION = 1
"""Of the kernels: a change that may move the fastest tile raises it, and files of other versions are not read."""
_BUCKETS = (8, 16, 32, 64, 128, 256)


class Config(NamedTuple):
    """How one product is cut into programs."""

    block_m: int
    """Tokens of a tile."""
    block_n: int
    """Rows of the weight in a tile, which divides ``layout.ROWS``."""
    split: int
    """Programs that share the columns of a tile and add up in a workspace."""
    warps: int
    stages: int
    """Blocks in flight."""
    scale_after: bool
    """Scale the sums of each group instead of the weight."""


class Device(NamedTuple):
    """What of a GPU matters to a choice."""

    kind: str
    """``sm_90``, ``gfx942``."""
    processors: int
    name: str = ""


class Problem(NamedTuple):
    """One product: [rows, columns] @ [out_features, columns].T"""

    bits: int
    group_size: int
    zero_point: bool
    levels: str
    dtype: str
    out_features: int
    blocks: int
    rows: int
    """Of the bucket."""


_SM90 = {
    8: Config(8, 128, 0, 4, 4, True),
    16: Config(16, 128, 0, 4, 4, True),
    32: Config(32, 128, 0, 4, 4, True),
    64: Config(64, 128, 0, 4, 4, False),
    128: Config(128, 128, 0, 8, 3, False),
    256: Config(128, 128, 0, 8, 3, False),
}
_SM80 = {
    8: Config(8, 128, 0, 4, 4, True),
    16: Config(16, 128, 0, 4, 4, True),
    32: Config(32, 128, 0, 4, 4, True),
    64: Config(64, 128, 0, 4, 3, False),
    128: Config(64, 128, 0, 4, 3, False),
    256: Config(128, 128, 0, 8, 3, False),
}
_GFX942 = {
    8: Config(16, 64, 0, 4, 2, True),
    16: Config(16, 64, 0, 4, 2, True),
    32: Config(32, 64, 0, 4, 2, True),
    64: Config(64, 128, 0, 4, 2, False),
    128: Config(64, 128, 0, 4, 2, False),
    256: Config(128, 128, 0, 8, 2, False),
}
TABLE: dict[str, dict[int, Config]] = {"sm_90": _SM90, "sm_80": _SM80, "gfx942": _GFX942}
"""Device class -> rows -> tile; split 0: chosen by ``_split``. Heuristic, to be replaced by what is measured. Kinds that
are not listed take the nearest older one of the same maker."""

CROSSOVER = {"sm_90": 256, "sm_80": 128, "gfx942": 128}
"""Device class -> the most rows that are multiplied without writing the weight out first. Writing it costs the same
whatever the rows, unpacking in the product is repeated for every tile of rows. To be measured; estimates."""


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The device class of a GPU; of anything else (the interpreter) an ``sm_90`` with one processor."""
    if device.type != "cuda":
        return Device("sm_90", 1)
    found = torch.cuda.get_device_properties(device)
    name = found.name.replace(" ", "_")
    if torch.version.hip:
        return Device(found.gcnArchName.split(":")[0], found.multi_processor_count, name)
    return Device(f"sm_{found.major}{found.minor}", found.multi_processor_count, name)


def nearest(kind: str) -> str:
    """The device class in ``TABLE`` that stands in for ``kind``."""
    if kind in TABLE:
        return kind
    if kind.startswith("gfx"):
        return "gfx942"
    # Above Hopper the matrix instructions of sm_80 remain, its own asynchronous ones do not.
    return "sm_80"


def crossover(device: Device) -> int:
    """The most rows for the product from packed weights on ``device``."""
    return CROSSOVER[nearest(device.kind)]


def bucket(rows: int) -> int:
    """``rows`` >= 1 rounded up to a row of the tables."""
    return next((size for size in _BUCKETS if rows <= size), _BUCKETS[-1])


def choose(problem: Problem, device: Device, run: Callable[[Config], None] | None = None) -> Config:
    """The tile for ``problem``.

    Args:
        run: runs the product with a given tile, for measuring; None where nothing can be measured (graph capture).
    """
    if run is not None and os.environ.get("QUANTKIT_AUTOTUNE") == "1":
        return _tuned(problem, device, run)
    return heuristic(problem, device)


def heuristic(problem: Problem, device: Device) -> Config:
    """The table's tile, with as many programs on a tile's columns as keep all processors busy."""
    return _split(TABLE[nearest(device.kind)][problem.rows], problem, device.processors)


def _split(config: Config, problem: Problem, processors: int) -> Config:
    """The smallest power of two that gives two programs to every processor, while each has two blocks and the
    workspace, which is written and read, stays under a fifth of the weight's bytes."""
    tiles = -(-problem.out_features // config.block_n) * -(-problem.rows // config.block_m)
    weight_bytes = problem.out_features * problem.blocks * 64
    split = 1
    while (
        tiles * split < 2 * processors
        and 4 * split <= problem.blocks
        and 2 * split * problem.rows * problem.out_features * 4 <= weight_bytes // 5
    ):
        split *= 2
    return config._replace(split=split)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Tiles worth timing: the heuristic's, and its neighbours in one direction each."""
    base = heuristic(problem, device)
    tried = [base]
    tried += [base._replace(split=split) for split in (1, 2, 4, 8, 16) if split <= problem.blocks]
    tried += [base._replace(stages=stages) for stages in (3, 4, 5, 6) if device.kind.startswith("sm_")]
    tried += [base._replace(block_n=64), base._replace(scale_after=not base.scale_after), base._replace(warps=8)]
    return list(dict.fromkeys(tried))


_fastest: dict[tuple[Device, Problem], Config] = {}


def _tuned(problem: Problem, device: Device, run: Callable[[Config], None]) -> Config:
    if (device, problem) not in _fastest:
        path = _cache_file(device)
        known = _read(path)
        key = "/".join(map(str, problem))
        if key not in known:
            known[key] = min((_milliseconds(run, config), config) for config in candidates(problem, device))[1]
            _write(path, _read(path) | known)
        _fastest[device, problem] = known[key]
    return _fastest[device, problem]


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    """Median, the caches flushed before each run; infinite for a tile that does not fit the device."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return float("inf")


def _cache_file(device: Device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "quantkit" / f"weight-only-{VERSION}-{device.kind}-{device.processors}-{device.name}.json"


def _read(path: Path) -> dict[str, Config]:
    """Nothing where there is no file, or not one of ours."""
    try:
        return {key: Config(*value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, known: dict[str, Config]) -> None:
    """All or nothing: other processes may read at any time. Where it cannot be written, memory has to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
