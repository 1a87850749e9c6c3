"""Every variant of the weight-only product that ``configs.py`` ships, compiled for GPUs that are not there.

    python -m quantkit.kernels.triton.weight_only_report [sm_80 sm_90 gfx942]

prints registers, spills, shared memory and the instructions per weight of the main loop; exits with 1 if one spills
or asks for more shared memory than there is. What a weight may cost before instructions and not memory set the time:
about 3.5 (H200), 5 (A100) at 4 bits, 2.5 and 4 at 3 bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from quantkit.kernels.triton import ahead, compat, configs, layout, weight_only, weight_only_kernels
from quantkit.kernels.triton.ahead import Built
from quantkit.kernels.triton.configs import Config, Device, Problem
from quantkit.recipe import PER_CHANNEL


class Variant(NamedTuple):
    """One compiled form of the product."""

    target: str
    bits: int
    group_size: int
    zero_point: bool
    levels: str
    dtype: str
    rows: int
    """Of the bucket of ``config``."""
    config: Config

    @property
    def name(self) -> str:
        kind = "NF4" if self.levels == "nf4" else f"{self.bits}{'Z' if self.zero_point else 'S'}"
        group = "C" if self.group_size == PER_CHANNEL else str(self.group_size)
        split = f" split {self.config.split}" if self.config.split > 1 else ""
        return f"W{kind} G{group} {self.dtype}, {self.rows} rows{split}"


FORMATS = (
    (8, PER_CHANNEL, False, "uniform"),
    (8, 32, True, "uniform"),
    (4, 128, False, "uniform"),
    (4, 64, True, "uniform"),
    (4, 32, False, "uniform"),
    (4, PER_CHANNEL, True, "uniform"),
    (3, 128, True, "uniform"),
    (2, 64, True, "uniform"),
    (4, 64, False, "nf4"),
)
"""Bits, group size, zero point, levels."""


PROCESSORS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}
"""Of an A100, an H100 or H200, an MI300X."""
SIZE = 4096
"""Rows and columns of the weight that the tiles are chosen for."""


def variants(target: str) -> Iterator[Variant]:
    """Every format, dtype and number of rows of the table, as ``configs.heuristic`` cuts it."""
    device = Device(target, PROCESSORS[target])
    for bits, group_size, zero_point, levels in FORMATS:
        blocks = SIZE // layout.block_columns(bits)
        for dtype in ("fp16", "bf16"):
            for rows in configs.TABLE[target]:
                problem = Problem(bits, group_size, zero_point, levels, dtype, SIZE, blocks, rows)
                config = configs.heuristic(problem, device)
                yield Variant(target, bits, group_size, zero_point, levels, dtype, rows, config)


def build(variant: Variant) -> Built:
    """Compile the product as ``weight_only`` launches it, with sizes that are multiples of 16 and a bias."""
    config, dtype = variant.config, f"*{variant.dtype}"
    arguments, constants = _weight(variant)
    arguments |= {"x_ptr": dtype, "bias_ptr": dtype, "out_ptr": dtype}
    arguments |= dict.fromkeys(("M", "N", "K", "blocks", "rows", "stride_x"), "i32")
    if config.split > 1:
        arguments |= {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
    else:
        constants |= {"partial_ptr": None, "arrived_ptr": None}
    constants |= {
        "SCALE_AFTER": config.scale_after,
        "SPLIT": config.split,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
    }
    return ahead.build(
        weight_only_kernels.matmul_kernel,
        arguments,
        constants,
        variant.target,
        config.warps,
        config.stages,
        divisible=("N", "K", "rows", "stride_x"),
    )


def build_dequantize(variant: Variant) -> Built:
    """Compile what writes the weight out for many rows; the tile of ``variant`` is not used."""
    arguments, constants = _weight(variant)
    arguments |= {"out_ptr": f"*{variant.dtype}"} | dict.fromkeys(("N", "K", "rows"), "i32")
    constants |= {"BLOCK_N": weight_only.DENSE_ROWS}
    return ahead.build(
        weight_only_kernels.dequantize_kernel, arguments, constants, variant.target, 4, 1, divisible=("N", "K", "rows")
    )


def _weight(variant: Variant) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants that say how the weight lies in memory."""
    optional = {"high_ptr": ("*u8", variant.bits == 3), "levels_ptr": (f"*{variant.dtype}", variant.levels == "nf4")}
    arguments = {"words_ptr": "*i16", "steps_ptr": "*i32"}
    arguments |= {name: kind for name, (kind, there) in optional.items() if there}
    tl = compat.module("language")
    constants = {
        **{name: None for name, (_, there) in optional.items() if not there},
        "BITS": variant.bits,
        "ZERO_POINT": variant.zero_point,
        "GROUP": 0 if variant.group_size == PER_CHANNEL else variant.group_size,
        "DTYPE": tl.bfloat16 if variant.dtype == "bf16" else tl.float16,
        "PTX": variant.target.startswith("sm_"),
    }
    return arguments, constants


def cost(variant: Variant, built: Built) -> float:
    """Instructions of a thread per weight of the main loop, all rows of the bucket's tile together."""
    threads = variant.config.warps * (32 if variant.target.startswith("sm_") else 64)
    return built.loop.total() * threads / (variant.config.block_n * layout.block_columns(variant.bits))


def main(targets: list[str]) -> int:
    """Print the table; 1 if a variant does not fit its target."""
    return ahead.print_lines(_lines(targets or ahead.TARGETS))


def _lines(targets: Iterable[str]) -> Iterator[ahead.Line]:
    for target in targets:
        for variant in variants(target):
            built, config = build(variant), variant.config
            more = {
                "tile": f"{config.block_n}x{config.block_m}",
                "warps": str(config.warps),
                "per weight": f"{cost(variant, built):.2f}",
            }
            yield ahead.Line(target, variant.name, built, more)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
