"""The kernels of single heads compiled for GPUs that are not there, with the sizes of models.

    python -m quantkit.kernels.triton.heads_report [sm_80 sm_90 gfx942]

prints what ``activation_report`` does; exits with 1 if one spills or asks for more shared memory than there is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from quantkit.formats.packing import words_per_row
from quantkit.kernels.triton import activation_report, heads, heads_kernels
from quantkit.kernels.triton.activation_report import Variant, grid_constants, made

STRIDES = ("stride_batch", "stride_head", "stride_token")
FEW, MANY = 8, 65536
"""Vectors of a decoding step and of a prompt."""


def turning(head_dim: int, dtype: str, rows: int, parts: int = 1) -> Variant:
    """``turn_kernel`` with a matrix of that many ``parts``."""
    cut = heads.tile(head_dim, rows, product=True)
    pointers = {name: (f"*{dtype}", there) for name, there in
                (("x_ptr", True), ("high_ptr", True), ("low_ptr", parts == 2), ("out_ptr", True))}  # fmt: skip
    numerics = {name: value for name, value in grid_constants(dtype, 8, True).items()
                if name in ("DTYPE", "INTERPRETED")}  # fmt: skip
    constants = numerics | {"DIM": head_dim, "D": cut.dim, "ROWS": cut.rows, "BLOCK_N": cut.columns}
    name = f"{dtype} @ {head_dim} x {head_dim}, {parts} part{'s' * (parts > 1)}, {rows} rows"
    return _counted(made(name, heads_kernels.turn_kernel, pointers, constants, STRIDES, cut.warps))


def encoding(
    head_dim: int, dtype: str, rows: int, bits: int, symmetric: bool = False, learned: bool = False
) -> Variant:
    """``encode_kernel``; ``learned``: shares of ranges are tensors."""
    cut = heads.tile(head_dim, rows, product=False)
    pointers = {
        "x_ptr": (f"*{dtype}", True),
        "low_ptr": ("*fp32", learned),
        "high_ptr": ("*fp32", learned),
        "codes_ptr": ("*i32", True),
        "scale_ptr": ("*fp16", True),
        "zero_ptr": ("*u8", not symmetric),
    }
    constants: dict[str, Any] = {"DIM": head_dim, "WORDS": words_per_row(head_dim, bits), "BITS": bits,
                 "SYMMETRIC": symmetric, "RECIPROCAL": True, "D": cut.dim, "ROWS": cut.rows}  # fmt: skip
    name = f"{dtype} [{head_dim}] KV{bits}{'' if symmetric else 'Z'}{' learned' * learned}, {rows} rows"
    variant = _counted(made(name, heads_kernels.encode_kernel, pointers, constants, STRIDES, cut.warps))
    return variant._replace(arguments=variant.arguments | {"low_share": "fp32", "high_share": "fp32"})


def _counted(variant: Variant) -> Variant:
    return variant._replace(arguments=variant.arguments | dict.fromkeys(("rows", "heads", "tokens"), "i32"))


def variants(target: str) -> Iterator[Variant]:
    """Both kernels, in the forms that differ most; the same on every target."""
    for rows in (FEW, MANY):
        for head_dim in (64, 80, 128, 256):
            yield turning(head_dim, "bf16", rows)
        yield turning(128, "fp16", rows, parts=2)
        yield turning(256, "bf16", rows, parts=2)
        for bits in (2, 3, 4, 8):
            yield encoding(128, "bf16", rows, bits, learned=bits == 4)
        yield encoding(80, "fp16", rows, 4, symmetric=True)
        yield encoding(256, "bf16", rows, 4)
        yield encoding(128, "fp32", rows, 4)


def main(targets: list[str]) -> int:
    """Print the table; 1 if a variant does not fit its target."""
    return activation_report.table(variants, targets)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
