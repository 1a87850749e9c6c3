"""Every variant of the integer product that ``integer_configs.py`` ships, compiled for GPUs that are not there.

    python -m quantkit.kernels.triton.integer_report [sm_80 sm_90 gfx942]

prints what ``weight_only_report`` does for the weight-only one, and the matrix instructions of the main loop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from quantkit.kernels.triton import ahead, integer, integer_configs, integer_kernels, integer_layout
from quantkit.kernels.triton.ahead import Built
from quantkit.kernels.triton.configs import Config, Device
from quantkit.kernels.triton.integer_configs import Problem
from quantkit.kernels.triton.weight_only_report import PROCESSORS, SIZE
from quantkit.recipe import PER_CHANNEL

PRODUCTS = {
    "sm_80": r"IMMA\.16832\.S8\.S8",
    "sm_90": r"IGMMA\.64x\d+x32\.S8\.S8",
    "gfx942": r"v_mfma_i32_\d+x\d+x\d+_i8",
}
"""The matrix instruction of a target: 8-bit integers, int32 sums."""


class Variant(NamedTuple):
    """One compiled form of the product."""

    target: str
    bits: int
    group_size: int
    zero_point: bool
    """Of the weight."""
    input_zero_point: bool
    rows: int
    """Of the bucket of ``config``."""
    config: Config

    @property
    def width(self) -> int:
        return integer_layout.WIDTHS[self.bits]

    @property
    def plane(self) -> int:
        return integer_layout.plane_of(self.width, self.group_size)

    @property
    def name(self) -> str:
        kind = f"W{self.bits}{'Z' if self.zero_point else 'S'}A8{'Z' if self.input_zero_point else ''}"
        group = "C" if self.group_size == PER_CHANNEL else str(self.group_size)
        split = f" split {self.config.split}" if self.config.split > 1 else ""
        return f"{kind} G{group}, {self.rows} rows{split}"


FORMATS = (
    (8, PER_CHANNEL, False, False),
    (8, PER_CHANNEL, False, True),
    (8, PER_CHANNEL, True, True),
    (8, 128, False, False),
    (8, 32, True, False),
    (4, PER_CHANNEL, False, False),
    (4, PER_CHANNEL, True, True),
    (4, 128, False, False),
    (4, 64, True, True),
    (4, 32, False, False),
    (2, 64, True, False),
)
"""Bits, group size, zero points of the weight, of the input. 4-bit inputs are the same kernel as those of 8,
3-bit weights the same as those of 4."""


def variants(target: str) -> Iterator[Variant]:
    """Every format and number of rows of the table, as ``integer_configs.heuristic`` cuts it."""
    device = Device(target, PROCESSORS[target])
    for bits, group_size, zero_point, input_zero_point in FORMATS:
        width = integer_layout.WIDTHS[bits]
        plane = integer_layout.plane_of(width, group_size)
        blocks = SIZE // integer_layout.block_columns(width, plane)
        for rows in integer_configs.TABLE[target]:
            problem = Problem(width, plane, group_size, zero_point, SIZE, blocks, rows)
            config = integer_configs.heuristic(problem, device)
            yield Variant(target, bits, group_size, zero_point, input_zero_point, rows, config)


def build(variant: Variant) -> Built:
    """Compile the product as ``integer`` launches it, with sizes that are multiples of 16, a bias, bfloat16 results."""
    config, width = variant.config, variant.width
    grouped = variant.group_size != PER_CHANNEL
    pointers = {
        "x_ptr": ("*i8", True),
        "x_scale_ptr": ("*fp32", True),
        "x_zero_ptr": ("*fp32", variant.input_zero_point),
        "x_sums_ptr": ("*i32", variant.zero_point and width == 8),
        "tiles_ptr": ("*i8", True),
        "steps_ptr": ("*i32", True),
        "sums_ptr": ("*fp32" if grouped else "*i32", variant.input_zero_point),
        "bias_ptr": ("*bf16", True),
        "out_ptr": ("*bf16", True),
        "partial_ptr": ("*fp32" if grouped else "*i32", config.split > 1),
        "arrived_ptr": ("*i32", config.split > 1),
    }
    arguments = {name: kind for name, (kind, there) in pointers.items() if there}
    arguments |= dict.fromkeys(("M", "N", "K", "blocks", "rows", "stride_x", "stride_scale", "stride_zero"), "i32")
    constants: dict[str, Any] = {name: None for name, (_, there) in pointers.items() if not there}
    constants |= {
        "WIDTH": width,
        "PLANE": variant.plane,
        "ZERO_POINT": variant.zero_point,
        "GROUP": variant.group_size if grouped else 0,
        "SPLIT": config.split,
        "REGISTERS": integer_configs.from_registers(Device(variant.target, 1)),
        "PTX": variant.target.startswith("sm_"),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "TALL": integer_configs.TALL,
    }
    return ahead.build(
        integer_kernels.matmul_kernel,
        arguments,
        constants,
        variant.target,
        config.warps,
        config.stages,
        divisible=("N", "K", "rows", "stride_x"),
    )


def build_sums(target: str) -> Built:
    """Compile what adds up the input's codes."""
    arguments = {"x_ptr": "*i8", "out_ptr": "*i32"} | dict.fromkeys(("M", "K", "group_columns", "stride_x"), "i32")
    constants = {"BLOCK_M": integer.SUMMED[0], "BLOCK_K": integer.SUMMED[1], "STAGES": 4}
    divisible = ("K", "group_columns", "stride_x")
    return ahead.build(integer_kernels.sums_kernel, arguments, constants, target, 4, 4, divisible=divisible)


def cost(variant: Variant, built: Built) -> float:
    """Instructions of a thread per weight of the main loop, all rows of the bucket's tile together."""
    threads = variant.config.warps * (32 if variant.target.startswith("sm_") else 64)
    columns = integer_layout.block_columns(variant.width, variant.plane)
    return built.loop.total() * threads / (variant.config.block_n * columns)


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
                "stages": str(config.stages),
                "per weight": f"{cost(variant, built):.2f}",
            }
            yield ahead.Line(target, variant.name, built, more, meant=built.count(PRODUCTS[target]) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
