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
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch

from quantkit.kernels.triton import compat
from quantkit.kernels.triton.layout import PLANE, block_columns
from quantkit.recipe import PER_CHANNEL

VERSION = 1
"""Of the kernels: a change that may move the fastest tile raises it, and files of other versions are not read."""
_BUCKETS = (8, 16, 32, 64, 128, 256)


class Tile(NamedTuple):
    """What a program computes."""

    block_m: int
    """Tokens."""
    block_n: int
    """Rows of the weight; divides ``layout.ROWS``."""
    warps: int
    stages: int
    """Blocks of columns in flight."""


class Config(NamedTuple):
    """How one product is cut into programs: ``Tile`` and what depends on the problem."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    split: int
    """Programs that share the columns of a tile and add up in a workspace."""
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
    8: Tile(8, 128, 4, 4),
    16: Tile(16, 128, 4, 4),
    32: Tile(32, 128, 4, 4),
    64: Tile(64, 128, 4, 4),
    128: Tile(128, 128, 8, 3),
    256: Tile(128, 128, 8, 3),
}
_SM80 = {
    8: Tile(8, 128, 4, 4),
    16: Tile(16, 128, 4, 4),
    32: Tile(32, 128, 4, 4),
    64: Tile(64, 128, 8, 3),  # 4 warps take fewer instructions, and up to 255 registers, which spill
    128: Tile(64, 128, 8, 3),
    256: Tile(128, 128, 8, 3),
}
_GFX942 = {
    8: Tile(16, 64, 4, 2),
    16: Tile(16, 64, 4, 2),
    32: Tile(32, 64, 4, 2),
    64: Tile(64, 128, 4, 2),
    128: Tile(64, 128, 4, 2),
    256: Tile(128, 128, 8, 2),
}
TABLE: dict[str, dict[int, Tile]] = {"sm_90": _SM90, "sm_80": _SM80, "gfx942": _GFX942}
"""Device class -> rows -> tile. Reasoned, to be replaced by what is measured. A kind that is not listed takes the
nearest older one of the same maker."""

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may have. Compilers do not check, launches do."""

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
    if may_measure(run):
        return tuned(problem, device, run, candidates, f"weight-only-{VERSION}")
    return heuristic(problem, device)


def may_measure(run: Callable[[Config], None] | None) -> TypeGuard[Callable[[Config], None]]:
    """Whether ``QUANTKIT_AUTOTUNE`` asks for it, and there is something to run."""
    return run is not None and os.environ.get("QUANTKIT_AUTOTUNE") == "1"


@lru_cache(maxsize=4096)
def heuristic(problem: Problem, device: Device) -> Config:
    """The table's tile, as far as it fits, with as many programs on a tile's columns as keep all processors busy."""
    kind = nearest(device.kind)
    tile = _fitting(TABLE[kind][problem.rows], problem, SHARED_LIMIT[kind])
    # Counted in compiled loops: below a quarter of the group's columns, scaling its sums takes fewer instructions than
    # scaling its weights, and more registers. One scale per row is applied once, at the end.
    after = problem.group_size == PER_CHANNEL or 4 * problem.rows <= problem.group_size
    return Config(*tile, split=_split(tile, problem, device.processors), scale_after=after)


def _fitting(tile: Tile, problem: Problem, limit: int) -> Tile:
    """Fewer tokens, then fewer blocks in flight, until words, scales and inputs fit into ``limit`` bytes."""
    columns = block_columns(problem.bits)
    weight = tile.block_n * (PLANE * (3 if problem.bits == 3 else 2) + 4 * columns // PLANE)
    block_m = tile.block_m
    while 2 * (weight + columns * block_m * 2) > limit and block_m > 16:
        block_m //= 2
    stages = min(tile.stages, max(1, limit // (weight + columns * block_m * 2)))
    return tile._replace(block_m=block_m, stages=stages)


def _split(tile: Tile, problem: Problem, processors: int) -> int:
    """The smallest power of two that gives each processor two programs, as long as a program has two blocks.

    Where three quarters of them have one already, only while the workspace stays under a fifth of the weight's bytes:
    that costs less than idle processors, not less than busy ones.
    """
    tiles = -(-problem.out_features // tile.block_n) * -(-problem.rows // tile.block_m)
    weight_bytes = problem.out_features * problem.blocks * 2 * PLANE
    return split_of(tiles, problem.blocks, problem.rows * problem.out_features, weight_bytes, processors)


def split_of(tiles: int, blocks: int, results: int, weight_bytes: int, processors: int) -> int:
    """``_split`` of a product of ``tiles`` tiles, ``blocks`` blocks of columns, ``results`` numbers."""
    split = 1
    while 4 * split <= blocks and (
        4 * tiles * split < 3 * processors
        or (tiles * split < 2 * processors and 8 * split * results <= weight_bytes // 5)
    ):
        split *= 2
    return split


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Tiles worth timing: the heuristic's, and its neighbours in one direction each."""
    base = heuristic(problem, device)
    tried = [base]
    tried += [base._replace(split=split) for split in (1, 2, 4, 8, 16) if split <= problem.blocks]
    tried += [base._replace(stages=stages) for stages in (3, 4, 5, 6) if device.kind.startswith("sm_")]
    tried += [base._replace(block_n=64), base._replace(scale_after=not base.scale_after), base._replace(warps=8)]
    return list(dict.fromkeys(tried))


_fastest: dict[tuple[str, Device, tuple[Any, ...]], Config] = {}

P = TypeVar("P", bound=tuple[Any, ...])


def tuned(
    problem: P, device: Device, run: Callable[[Config], None], tried: Callable[[P, Device], list[Config]], family: str
) -> Config:
    """The fastest of ``tried(problem, device)``, measured once.

    Args:
        problem: a named tuple of numbers and strings.
        family: of kernels, with their version: each has its own file.
    """
    if (family, device, problem) not in _fastest:
        path = _cache_file(device, family)
        known = _read(path)
        key = "/".join(map(str, problem))
        if key not in known:
            known[key] = min((_milliseconds(run, config), config) for config in tried(problem, device))[1]
            _write(path, _read(path) | known)
        _fastest[family, device, problem] = known[key]
    return _fastest[family, device, problem]


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    """Median, the caches flushed before each run; infinite for a tile that does not fit the device."""
    try:
        return float(compat.module("testing").do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median"))
    except compat.module("runtime.errors").OutOfResources:
        return float("inf")


def _cache_file(device: Device, family: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # What is fastest, and what fits at all, another compiler changes.
    compiler = f"triton-{compat.version()}"
    return root / "quantkit" / f"{family}-{device.kind}-{device.processors}-{device.name}-{compiler}.json"


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
