"""The kernels of activations compiled for GPUs that are not there, with the sizes of models.

    python -m quantkit.kernels.triton.activation_report [sm_80 sm_90 gfx942]

prints registers, spills and shared memory; exits with 1 if one spills or asks for more shared memory than there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from quantkit.kernels import online
from quantkit.kernels.triton import (
    activation,
    activation_kernels,
    ahead,
    fused_kernels,
    transforms,
    transforms_kernels,
)
from quantkit.kernels.triton.ahead import Built


class Variant(NamedTuple):
    """One compiled form of a kernel."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 1
    divisible: tuple[str, ...] = ()


WIDTHS = (896, 4096, 5120, 14336, 28672)
"""Columns of the inputs of linears."""
COLUMNS = (
    896, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120, 7168, 8192, 8960, 9728, 11008, 13824, 14336, 18432, 18944,
    27648, 28672, 29568,
)  # fmt: skip
"""Those of Llama, Qwen and DeepSeek models, multiplied by Kronecker products."""
HIDDEN = (896, 4096, 5120, 8192, 16384)
"""Columns that norms read."""


def grid_constants(dtype: str, bits: int, symmetric: bool, own: bool = True) -> dict[str, Any]:
    """The constants that every kernel that rounds has, as a launch on a GPU passes them."""
    x = torch.empty(0, dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    given = None if own else x
    constants = activation.Grid(None, given, None, bits, symmetric).constants(x) | activation.numerics(x)
    del constants["enable_fp_fusion"]
    return constants | {"RECIPROCAL": True, "INTERPRETED": False}


def rounding(
    columns: int, dtype: str, bits: int = 8, symmetric: bool = True, own: bool = True, packed: bool = False,
    changed: bool = False, clipped: bool = False,
) -> Variant:  # fmt: skip
    """``quantize_kernel`` for rows of ``columns``, a multiple of 16."""
    pointers = {
        "x_ptr": (f"*{dtype}", True),
        "scale_ptr": (f"*{dtype}", changed),
        "shift_ptr": (f"*{dtype}", changed),
        "signs_ptr": ("*i8", False),
        "clip_ptr": (f"*{dtype}", clipped),
        "given_scale_ptr": (f"*{dtype}", not own),
        "given_zero_ptr": ("*i8", not own and not symmetric),
        "codes_ptr": ("*i8", True),
        "row_scale_ptr": ("*fp32", True),
        "row_zero_ptr": ("*fp32", not symmetric),
    }
    block = activation.block_of(columns)
    constants = grid_constants(dtype, bits, symmetric, own) | {
        "PACKED": packed, "BLOCK": block, "WHOLE": block >= columns,
    }  # fmt: skip
    kind = f"A{bits}{'' if symmetric else 'Z'}{'' if own else ' static'}{' packed' * packed}"
    kind += " x t + s" * changed + " clip" * clipped
    return made(f"{kind} {dtype}, {columns}", activation_kernels.quantize_kernel, pointers, constants,
                ("columns", "stride_x"), activation.warps(block))  # fmt: skip


def normed(
    columns: int, dtype: str, kind: str = "llama", residual: bool = True, bits: int = 8, symmetric: bool = True,
    packed: bool = False, changed: bool = False, clipped: bool = False,
) -> Variant:  # fmt: skip
    """``norm_kernel`` for rows of ``columns``, a multiple of 16, that are written themselves, too."""
    pointers = {
        "x_ptr": (f"*{dtype}", True),
        "residual_ptr": (f"*{dtype}", residual),
        "weight_ptr": (f"*{dtype}", True),
        "bias_ptr": (f"*{dtype}", kind == "layer"),
        "sum_ptr": (f"*{dtype}", residual),
        "values_ptr": (f"*{dtype}", True),
    } | _rounded_to(dtype, symmetric, changed, clipped)
    block = activation.power(columns)
    constants = grid_constants(dtype, bits, symmetric) | {"KIND": kind, "PACKED": packed, "BLOCK": block}
    name = f"{kind}{' + residual' * residual} A{bits}{'' if symmetric else 'Z'}{' packed' * packed}"
    name += " x t + s" * changed + " clip" * clipped
    sizes = ("columns", "stride_x", "stride_residual")
    return made(f"{name} {dtype}, {columns}", fused_kernels.norm_kernel, pointers, constants, sizes,
                activation.warps(block))  # fmt: skip


def gated(
    columns: int, dtype: str, function: str = "silu", bits: int = 8, symmetric: bool = True, packed: bool = False,
    changed: bool = False, clipped: bool = False,
) -> Variant:  # fmt: skip
    """``gated_kernel`` for rows of ``columns``, a multiple of 16."""
    pointers = {"gate_ptr": (f"*{dtype}", True), "up_ptr": (f"*{dtype}", True)}
    pointers |= _rounded_to(dtype, symmetric, changed, clipped)
    block = activation.block_of(columns)
    constants = grid_constants(dtype, bits, symmetric) | {
        "ACTIVATION": function, "PACKED": packed, "BLOCK": block, "WHOLE": block >= columns,
    }  # fmt: skip
    name = f"{function} A{bits}{'' if symmetric else 'Z'}{' packed' * packed}{' x t + s' * changed}{' clip' * clipped}"
    sizes = ("columns", "stride_gate", "stride_up")
    return made(f"{name} {dtype}, {columns}", fused_kernels.gated_kernel, pointers, constants, sizes,
                activation.warps(block))  # fmt: skip


def _rounded_to(dtype: str, symmetric: bool, changed: bool, clipped: bool) -> dict[str, tuple[str, bool]]:
    """The pointers of what is done to a row with a grid of its own, and of its codes."""
    return {
        "scale_ptr": (f"*{dtype}", changed),
        "shift_ptr": (f"*{dtype}", changed),
        "clip_ptr": (f"*{dtype}", clipped),
        "given_scale_ptr": (f"*{dtype}", False),
        "given_zero_ptr": ("*i8", False),
        "codes_ptr": ("*i8", True),
        "row_scale_ptr": ("*fp32", True),
        "row_zero_ptr": ("*fp32", not symmetric),
    }


def product(
    target: str, columns: int, dtype: str, rounded: bool = True, hadamard: bool = False, bits: int = 4,
    symmetric: bool = True, packed: bool = False, changed: bool = False, clipped: bool = False,
) -> Variant:  # fmt: skip
    """The kernel of ``transforms`` for rows of ``columns``; one that does not hold all of a row does not round."""
    left, right = transforms.hadamard_sides(columns) if hadamard else online.kronecker_split(columns)
    cut = transforms.tile(left, right, target)
    rounded = rounded and cut.whole
    pointers = {
        "x_ptr": (f"*{dtype}", True),
        "scale_ptr": (f"*{dtype}", changed),
        "shift_ptr": (f"*{dtype}", changed),
        "signs_ptr": ("*i8", hadamard),
        "left_ptr": (f"*{dtype}", True),
        "right_ptr": (f"*{dtype}", True),
        "out_ptr": (f"*{dtype}", not rounded),
    }
    sizes: dict[str, Any] = {"LEFT": left, "RIGHT": right} | transforms.blocks(cut)
    name = f"{left} x {right}{' signs' * hadamard}{' x t + s' * changed}{' clip' * clipped} {dtype}"
    if not cut.whole:
        numerics = {name: value for name, value in grid_constants(dtype, bits, True).items() if name in _NUMERICS}
        return made(name, transforms_kernels.columns_kernel, pointers, sizes | numerics, ("stride_x",), cut.warps,
                    cut.stages)  # fmt: skip
    pointers |= {
        "clip_ptr": (f"*{dtype}", clipped),
        "given_scale_ptr": (f"*{dtype}", False),
        "given_zero_ptr": ("*i8", False),
        "codes_ptr": ("*i8", rounded),
        "row_scale_ptr": ("*fp32", rounded),
        "row_zero_ptr": ("*fp32", rounded and not symmetric),
    }
    name += f" A{bits}{'' if symmetric else 'Z'}{' packed' * packed}" if rounded else ""
    constants = sizes | grid_constants(dtype, bits, symmetric) | {"QUANTIZE": rounded, "PACKED": packed}
    return made(name, transforms_kernels.token_kernel, pointers, constants, ("stride_x",), cut.warps,
                cut.stages)  # fmt: skip


_NUMERICS = ("DTYPE", "INTERPRETED")


def made(
    name: str, kernel: Any, pointers: dict[str, tuple[str, bool]], constants: dict[str, Any], sizes: tuple[str, ...],
    warps: int, stages: int = 1,
) -> Variant:  # fmt: skip
    """A variant whose ``pointers`` (type, whether it is there) and ``sizes`` are as a launch passes them."""
    arguments = {name: kind for name, (kind, there) in pointers.items() if there} | dict.fromkeys(sizes, "i32")
    absent = {name: None for name, (_, there) in pointers.items() if not there}
    arguments |= {name: "fp32" for name in ("factor", "epsilon", "share") if name in kernel.arg_names}
    return Variant(name, kernel, arguments, absent | constants, warps, stages, sizes)


def variants(target: str) -> Iterator[Variant]:
    """Every kernel, in the forms that differ most."""
    for columns in WIDTHS:
        yield rounding(columns, "bf16")
    yield rounding(14336, "fp16", bits=4, packed=True)
    yield rounding(14336, "bf16", symmetric=False, changed=True, clipped=True)
    yield rounding(28672, "bf16", symmetric=False, changed=True, clipped=True)
    yield rounding(14336, "fp32", symmetric=False)
    yield rounding(14336, "bf16", symmetric=False, own=False)
    for columns in HIDDEN:
        yield normed(columns, "bf16")
    yield normed(3584, "bf16", kind="gemma", residual=False, symmetric=False, changed=True, clipped=True)
    yield normed(4096, "fp16", kind="layer", bits=4, packed=True)
    yield normed(16384, "fp32", kind="layer", symmetric=False, changed=True)
    for columns in WIDTHS:
        yield gated(columns, "bf16")
    yield gated(14336, "bf16", function="gelu", symmetric=False, changed=True, clipped=True)
    yield gated(14336, "fp32", function="gelu", symmetric=False)
    yield gated(28672, "fp16", bits=4, packed=True, symmetric=False)
    for columns in COLUMNS:
        yield product(target, columns, "bf16")
    yield product(target, 4096, "fp16", bits=8, symmetric=False, changed=True, clipped=True)
    yield product(target, 14336, "fp16", bits=8, symmetric=False, changed=True, clipped=True)
    yield product(target, 14336, "fp16", packed=True)
    yield product(target, 14336, "bf16", rounded=False)
    for columns in (4096, 5120, 11008, 14336, 18944, 28672):
        yield product(target, columns, "bf16", hadamard=True)


def build(variant: Variant, target: str) -> Built:
    """Compile ``variant`` as it is launched on ``target``."""
    return ahead.build(
        variant.kernel, variant.arguments, variant.constants, target, variant.warps, variant.stages,
        divisible=variant.divisible, fusion=False,
    )  # fmt: skip


def main(targets: list[str]) -> int:
    """Print the table; 1 if a variant does not fit its target."""
    return table(variants, targets)


def table(of: Callable[[str], Iterable[Variant]], targets: list[str]) -> int:
    """Print what ``of`` every target yields; 1 if one of that does not fit."""

    def lines() -> Iterator[ahead.Line]:
        for target in targets or ahead.TARGETS:
            for variant in of(target):
                built = build(variant, target)
                more = {"warps": str(variant.warps), "instructions": str(built.instructions.total())}
                yield ahead.Line(target, variant.name, built, more)

    return ahead.print_lines(lines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
