"""Activations to codes on GPUs in one pass over them, through Triton: what ``input_codes.quantize`` computes.

The scale and shift of a layer's input are applied on the way. Inputs that a matrix is to be applied to first are those
of ``transforms.py``. A launch neither allocates an unknown size nor waits for the device.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.library import define
from quantkit.kernels.reference import grid_over
from quantkit.kernels.triton import compat, weight_only
from quantkit.recipe import ActivationScheme

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WHOLE_COLUMNS = 16384
"""Rows up to this long stay in registers between their range and their codes."""
_PART_COLUMNS = 4096
"""Of a longer row, in hand at once; the second time it comes from a cache."""


def refuses(dtype: torch.dtype, device: torch.device, scheme: ActivationScheme) -> str | None:
    """Why ``quantize`` does not take activations of ``dtype`` on ``device``; None if it does."""
    if device.type != "cuda":
        return f"for GPUs, not {device.type}"
    if not compat.AVAILABLE:
        return compat.MISSING
    if scheme.granularity == "group":
        return f"for one scale per token, not per {scheme.group_size} channels"
    if dtype not in DTYPES:
        return f"for models of 16 or 32 bits, not {str(dtype).removeprefix('torch.')}"
    return weight_only.incapable(device)


def quantize(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    """The codes of ``x * scale + shift`` for ``x`` [..., columns], per token or per tensor.

    Args:
        inputs: of which scale, shift, static range and clip matter here; without a matrix (``op`` is none).
    """
    assert inputs.op == "none"
    return as_codes(_op(x, inputs.scale, inputs.shift, *grid_tensors(inputs), *grid_numbers(scheme), False), scheme)


def quantize_packed(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    """As ``quantize``, for an even number of columns and codes of up to 4 bits: codes [rows, columns / 2] int8, that of
    an even column in the low half of its byte, both in two's complement. ``unpack`` is the inverse."""
    if scheme.bits > 4 or x.shape[-1] % 2:
        raise ValueError(f"two codes of {scheme.bits} bits of {x.shape[-1]} columns do not fill bytes")
    return as_codes(_op(x, inputs.scale, inputs.shift, *grid_tensors(inputs), *grid_numbers(scheme), True), scheme)


def unpack(packed: Tensor) -> Tensor:
    """Codes [rows, columns] int8 out of those of ``quantize_packed``."""
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(-2)


def grid_tensors(inputs: LayerInputs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What an operator is given for the grid: clip, static scale, static zero point."""
    return inputs.clip, inputs.static_scale, inputs.static_zero_point


def grid_numbers(scheme: ActivationScheme) -> tuple[int, bool, bool]:
    """And the numbers that go with them: bits, symmetric, per tensor."""
    return scheme.bits, scheme.symmetric, scheme.granularity == "tensor"


def as_codes(made: tuple[Tensor, Tensor, Tensor], scheme: ActivationScheme) -> InputCodes:
    """What an operator returned; the zero points of a symmetric grid are not there."""
    codes, scale, zero_point = made
    return InputCodes(codes, scale, None if scheme.symmetric else zero_point)


class Grid(NamedTuple):
    """The grid that kernels round to, or how it is found."""

    clip: Tensor | None
    scale: Tensor | None
    """One for all of x; None: every row has its own."""
    zero_point: Tensor | None
    bits: int
    symmetric: bool

    def constants(self, x: Tensor) -> dict[str, Any]:
        """What kernels are compiled for, for ``x``."""
        return {
            "BITS": self.bits,
            "SYMMETRIC": self.symmetric,
            "OWN": self.scale is None,
            "RECIPROCAL": x.is_cuda,
            "EPS": torch.finfo(x.dtype).eps,
        }


class Made(NamedTuple):
    """What kernels write for x [rows, columns]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    """[rows, 1]; symmetric: [0, 1]."""

    def pointers(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.scale, self.zero_point if len(self.zero_point) else None


def empty(x: Tensor, columns: int, symmetric: bool, packed: bool) -> Made:
    """Room for the codes of ``x`` [..., columns]."""
    rows = x.numel() // columns
    return Made(
        x.new_empty(rows, columns // 2 if packed else columns, dtype=torch.int8),
        x.new_empty(rows, 1, dtype=torch.float32),
        x.new_empty(0 if symmetric else rows, 1, dtype=torch.float32),
    )


def numerics(x: Tensor) -> dict[str, Any]:
    """Constants that follow from the dtype and the place of ``x``. ``enable_fp_fusion``: as PyTorch rounds."""
    return {
        "DTYPE": weight_only.triton_dtype(x.dtype),
        "INTERPRETED": not x.is_cuda,
        "enable_fp_fusion": False,
    }


def flat(x: Tensor) -> Tensor:
    """[rows, columns] with columns next to each other."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def power(columns: int) -> int:
    """The next power of two; what is packed comes in pairs."""
    return max(2, 1 << (columns - 1).bit_length())


def block_of(columns: int) -> int:
    """Columns of a row that a program has in hand at once."""
    block = power(columns)
    return block if block <= WHOLE_COLUMNS else _PART_COLUMNS


def warps(columns: int) -> int:
    """Of a program with ``columns`` in hand: 16 to 32 numbers per thread, which loads of 16 bytes fill."""
    return max(1, min(16, columns // 1024))


def run(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, clip: Tensor | None, static_scale: Tensor | None,
    static_zero_point: Tensor | None, bits: int, symmetric: bool, per_tensor: bool, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``quantkit::input_codes``: arguments as in ``LayerInputs`` and ``ActivationScheme``."""
    made = empty(x, x.shape[-1], symmetric, packed)
    if x.numel() == 0:
        return made
    rows = flat(x)
    grid = Grid(clip, static_scale, static_zero_point, bits, symmetric)
    if per_tensor and static_scale is None:
        grid = _of_all(rows, scale, shift, grid)
    columns = rows.shape[1]
    block = block_of(columns)
    with weight_only.on_device(rows):
        _kernels().quantize_kernel[(len(rows),)](
            rows,
            scale,
            shift,
            None,
            grid.clip if grid.scale is None else None,
            grid.scale,
            grid.zero_point,
            *made.pointers(),
            columns,
            rows.stride(0),
            PACKED=packed,
            BLOCK=block,
            WHOLE=block >= columns,
            num_warps=warps(block),
            **grid.constants(rows),
            **numerics(rows),
        )
    return made


def _of_all(x: Tensor, scale: Tensor | None, shift: Tensor | None, grid: Grid) -> Grid:
    """``grid`` over the range of all of ``x`` [rows, columns]."""
    low, high = x.new_empty(2, len(x), dtype=torch.float32)
    block = min(power(x.shape[1]), _PART_COLUMNS)
    with weight_only.on_device(x):
        _kernels().extent_kernel[(len(x),)](
            x, scale, shift, None, low, high, x.shape[1], x.stride(0),
            BLOCK=block, num_warps=warps(block), **numerics(x),
        )  # fmt: skip
    least, largest = low.amin().to(x.dtype), high.amax().to(x.dtype)
    if grid.clip is not None:
        least, largest = least * grid.clip[0].to(x.dtype), largest * grid.clip[1].to(x.dtype)
    scheme = ActivationScheme(bits=grid.bits, symmetric=grid.symmetric, granularity="tensor")
    step, zero_point = grid_over(least, largest, scheme, x.dtype)
    return Grid(None, step, zero_point, grid.bits, grid.symmetric)


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.activation_kernels")


def _shapes_only(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, clip: Tensor | None, static_scale: Tensor | None,
    static_zero_point: Tensor | None, bits: int, symmetric: bool, per_tensor: bool, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty(x, x.shape[-1], symmetric, packed)


_op = define(
    "input_codes(Tensor x, Tensor? scale, Tensor? shift, Tensor? clip, Tensor? static_scale, "
    "Tensor? static_zero_point, int bits, bool symmetric, bool per_tensor, bool packed) -> (Tensor, Tensor, Tensor)",
    run,
    _shapes_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
