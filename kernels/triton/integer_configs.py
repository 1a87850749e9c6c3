"""Which tile an integer product runs with: what ``configs.py`` is for the weight-only one, and measured as that is."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from quantkit.kernels.triton import configs
from quantkit.kernels.triton.configs import SHARED_LIMIT, Config, Device, Tile, nearest
from quantkit.kernels.triton.integer_layout import block_columns
from quantkit.recipe import PER_CHANNEL

VERSION = 1
"""Of the kernels, as ``configs.VERSION``."""
TALL = 8
"""Tiles of tokens that neighbouring programs go through with the same rows of the weight."""
_BUCKETS = (8, 16, 32, 64, 128, 256, 1024)


class Problem(NamedTuple):
    """One product: [rows, columns] @ [out_features, columns].T"""

    width: int
    """Bits of a code in a byte."""
    plane: int
    group_size: int
    zero_point: bool
    out_features: int
    blocks: int
    rows: int
    """Of the bucket."""


_SM90 = {
    8: Tile(8, 128, 4, 4),
    16: Tile(16, 128, 4, 4),
    32: Tile(32, 128, 4, 4),
    64: Tile(64, 128, 8, 4),  # 4 warps take up to 255 registers, which spill
    128: Tile(128, 128, 8, 3),
    256: Tile(128, 128, 8, 3),
    1024: Tile(256, 128, 8, 4),
}
_SM80 = {
    8: Tile(8, 128, 4, 4),
    16: Tile(16, 128, 4, 4),
    32: Tile(32, 128, 4, 4),
    64: Tile(64, 128, 8, 3),
    128: Tile(64, 128, 8, 3),
    256: Tile(64, 128, 8, 3),  # 128 tokens and a split take up to 255 registers, which spill
    1024: Tile(128, 128, 8, 3),
}
_GFX942 = {
    8: Tile(16, 64, 4, 2),
    16: Tile(16, 64, 4, 2),
    32: Tile(32, 64, 4, 2),
    64: Tile(64, 128, 4, 2),
    128: Tile(64, 128, 4, 2),
    256: Tile(128, 128, 8, 2),
    1024: Tile(128, 128, 8, 2),
}
TABLE: dict[str, dict[int, Tile]] = {"sm_90": _SM90, "sm_80": _SM80, "gfx942": _GFX942}
"""Device class -> rows -> tile. Reasoned and compiled, to be replaced by what is measured."""
_WIDEST_UNLESS_PLAIN = 128
"""Tokens of a tile that keeps two sums, that of the group and that of all, or takes zero points of the weight off them:
256 would take every register."""


def bucket(rows: int) -> int:
    """``rows`` >= 1 rounded up to a row of the tables."""
    return next((size for size in _BUCKETS if rows <= size), _BUCKETS[-1])


def choose(problem: Problem, device: Device, run: Callable[[Config], None] | None = None) -> Config:
    """The tile for ``problem``; ``run`` as in ``configs.choose``. Scales always come after the product."""
    if configs.may_measure(run):
        return configs.tuned(problem, device, run, candidates, f"integer-{VERSION}")
    return heuristic(problem, device)


def from_registers(device: Device) -> bool:
    """Whether 8-bit operands, too, go through registers: all but Hopper's matrix instructions read nothing else."""
    return nearest(device.kind) == "sm_80"


@lru_cache(maxsize=4096)
def heuristic(problem: Problem, device: Device) -> Config:
    """The table's tile, as far as it fits, with as many programs on a tile's columns as keep all processors busy."""
    kind = nearest(device.kind)
    tile = TABLE[kind][problem.rows]
    if problem.group_size != PER_CHANNEL or problem.zero_point:
        tile = tile._replace(block_m=min(tile.block_m, _WIDEST_UNLESS_PLAIN))
    stages = min(tile.stages, max(1, SHARED_LIMIT[kind] // _stage_bytes(tile, problem)))
    tile = tile._replace(stages=stages)
    return Config(*tile, split=_split(tile, problem, device.processors), scale_after=True)


def _stage_bytes(tile: Tile, problem: Problem) -> int:
    """Of shared memory, for one block of columns: packed weight, steps, inputs."""
    columns = block_columns(problem.width, problem.plane)
    groups = 1 if problem.group_size == PER_CHANNEL else -(-columns // problem.group_size)
    return tile.block_n * (problem.plane + 4 * groups) + columns * tile.block_m


def _split(tile: Tile, problem: Problem, processors: int) -> int:
    """The smallest power of two that gives each processor two programs, as ``configs.heuristic`` finds it."""
    tiles = -(-problem.out_features // tile.block_n) * -(-problem.rows // tile.block_m)
    weight_bytes = problem.out_features * problem.blocks * problem.plane
    return configs.split_of(tiles, problem.blocks, problem.rows * problem.out_features, weight_bytes, processors)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Tiles worth timing: the heuristic's, and its neighbours in one direction each."""
    base = heuristic(problem, device)
    tried = [base]
    tried += [base._replace(split=split) for split in (1, 2, 4, 8, 16) if split <= problem.blocks]
    tried += [base._replace(stages=stages) for stages in (3, 4, 5, 6) if device.kind.startswith("sm_")]
    tried += [base._replace(block_n=64), base._replace(warps=12 - base.warps)]
    tried += [base._replace(block_m=block_m) for block_m in (64, 128, 256) if problem.rows >= block_m]
    return list(dict.fromkeys(tried))
