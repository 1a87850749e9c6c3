"""The matrices of ``online.py`` on GPUs, through Triton: Kronecker products and Hadamard matrices, which are such.

    apply       x' = M (x * scale + shift) in the dtype of x, for what reads it unrounded
    quantize    its codes; of rows of up to 128 x 128 (sm_80: 64 x 128) in one kernel, of longer ones in two

    H_n = (Paley (x) Sylvester_i) (x) Sylvester_b        n = base * i * b, base * i and b close to each other

so that 14336 is 112 x 128 and 4096 is 64 x 64. Products of 16-bit numbers are added up in float32, and x' is rounded
once, as the reference does; codes differ from its codes where that leaves a number next to the middle of two.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import hadamard
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.library import define
from quantkit.kernels.triton import activation, compat, configs, weight_only
from quantkit.kernels.triton.activation import Grid
from quantkit.recipe import ActivationScheme

LARGEST_LEFT = 512
"""Rows of V: a program holds a few of its columns whole."""
LARGEST_RIGHT = 1024
_WHOLE = {"sm_80": 64 * 128, "sm_90": 128 * 128, "gfx942": 128 * 128}
"""Device class -> elements of the largest V, filled up, that one program holds as a whole without spilling registers;
no side is above 128, which both factors' place in shared memory sets."""


class Tile(NamedTuple):
    """How programs take V [left, right]."""

    a: int
    """``left``, filled up."""
    b: int
    """``right``, filled up; columns of a program where it does not hold all of V."""
    whole: bool
    warps: int
    stages: int
    """Parts of V in flight."""


def refuses(inputs: LayerInputs, dtype: torch.dtype, device: torch.device, columns: int) -> str | None:
    """Why ``apply`` does not take x [..., columns] of ``dtype`` on ``device``; None if it does."""
    if device.type != "cuda":
        return f"for GPUs, not {device.type}"
    if not compat.AVAILABLE:
        return compat.MISSING
    return unsuited(inputs, dtype, columns) or weight_only.incapable(device)


def unsuited(inputs: LayerInputs, dtype: torch.dtype, columns: int) -> str | None:
    """The part of ``refuses`` that no device changes."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"for half and bfloat16 models, not {str(dtype).removeprefix('torch.')}"
    if inputs.left is not None and inputs.right is not None:
        left, right = len(inputs.left), len(inputs.right)
    elif inputs.signs is not None:
        if hadamard.split(columns).kind == "hartley":
            return f"{columns} columns have no Hadamard matrix"
        left, right = hadamard_sides(columns)
    else:
        return f"for Kronecker products and Hadamard matrices, not for {inputs.op}"
    if left > LARGEST_LEFT or right > LARGEST_RIGHT:
        return f"for factors of up to {LARGEST_LEFT} and {LARGEST_RIGHT}, not {left} and {right}"
    return None


def apply(x: Tensor, inputs: LayerInputs) -> Tensor:
    """M (x * scale + shift) for every row of ``x`` [..., columns], in its dtype."""
    y: Tensor = _apply(x, inputs.scale, inputs.shift, inputs.signs, inputs.left, inputs.right)
    return y


def quantize(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    """The codes of ``apply(x, inputs)``, per token or per tensor."""
    return _codes(x, scheme, inputs, False)


def quantize_packed(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    """The same, two codes of up to 4 bits to a byte as ``activation.quantize_packed`` has them; M's right factor has an
    even number of columns."""
    right = hadamard_sides(x.shape[-1])[1] if inputs.right is None else len(inputs.right)
    if scheme.bits > 4 or right % 2:
        raise ValueError(f"two codes of {scheme.bits} bits of {right} columns do not fill bytes")
    return _codes(x, scheme, inputs, True)


def _codes(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs, packed: bool) -> InputCodes:
    made = _quantize(
        x,
        inputs.scale,
        inputs.shift,
        inputs.signs,
        inputs.left,
        inputs.right,
        *activation.grid_tensors(inputs),
        *activation.grid_numbers(scheme),
        packed,
    )
    return activation.as_codes(made, scheme)


@lru_cache(maxsize=64)
def hadamard_sides(columns: int) -> tuple[int, int]:
    """(a, b), a * b = ``columns``: the Hadamard matrix as one of order a and, a power of two, one of order b."""
    found = hadamard.split(columns)
    pairs = [(columns // power, power) for power in (2**bit for bit in range(found.power.bit_length()))]
    # The fewest operations with sides as the kernels fill them up; of as many, the longer rows of V.
    return min(pairs, key=lambda pair: (_filled(pair[0]) * _filled(pair[1]) * (_filled(pair[0]) + _filled(pair[1])),
                                        -pair[1]))  # fmt: skip


@lru_cache(maxsize=64)
def _hadamard_factors(columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(left, right): H @ v, v read as V [a, b], is left.T @ V @ right."""
    found, (a, b) = hadamard.split(columns), hadamard_sides(columns)
    with torch.inference_mode(False):
        left = hadamard.sylvester(a // found.base)
        if found.base > 1:
            left = torch.kron(hadamard.paley(found.base), left)
        return left.mT.to(device, dtype).contiguous(), hadamard.sylvester(b).to(device, dtype)


def tile(left: int, right: int, device: torch.device | str) -> Tile:
    """For V [left, right]; ``device``: where, or its class."""
    kind = device if isinstance(device, str) else configs.nearest(configs.device_of(device).kind)
    a, b = _filled(left), _filled(right)
    if max(a, b) <= 128 and a * b <= _WHOLE[kind]:
        return Tile(a, b, True, 8 if a * b >= 8192 else 4, 1)
    return Tile(a, min(b, 64 if a <= 128 else 8192 // a), False, 8, 2 if a <= 256 else 1)


def _filled(side: int) -> int:
    """The next power of two; matrix units take 16 at least."""
    return max(16, 1 << (side - 1).bit_length())


class _Matrix(NamedTuple):
    """M, and what comes before it."""

    scale: Tensor | None
    shift: Tensor | None
    signs: Tensor | None
    left: Tensor
    right: Tensor
    factor: float

    def pointers(self) -> tuple[Tensor | None, ...]:
        return self.scale, self.shift, self.signs, self.left, self.right


def _matrix(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, signs: Tensor | None, left: Tensor | None,
    right: Tensor | None,
) -> _Matrix:  # fmt: skip
    if signs is not None:
        columns = x.shape[-1]
        return _Matrix(scale, shift, signs, *_hadamard_factors(columns, x.dtype, x.device), columns**-0.5)
    assert left is not None
    assert right is not None
    return _Matrix(scale, shift, None, left.contiguous(), right.contiguous(), 1.0)


def _transform(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, signs: Tensor | None, left: Tensor | None,
    right: Tensor | None,
) -> Tensor:  # fmt: skip
    """The operator ``quantkit::transform_input``: arguments as in ``LayerInputs``."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    rows, matrix = activation.flat(x), _matrix(x, scale, shift, signs, left, right)
    cut = tile(len(matrix.left), len(matrix.right), x.device)
    if cut.whole:
        _whole(rows, matrix, cut, None, (None, None, None), out, False)
    else:
        _by_columns(rows, matrix, cut, out)
    return out


def _transform_codes(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, signs: Tensor | None, left: Tensor | None,
    right: Tensor | None, clip: Tensor | None, static_scale: Tensor | None, static_zero_point: Tensor | None, bits: int,
    symmetric: bool, per_tensor: bool, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``quantkit::transform_input_codes``: arguments as in ``LayerInputs`` and ``ActivationScheme``."""
    made = activation.empty(x, x.shape[-1], symmetric, packed)
    if x.numel() == 0:
        return made
    matrix = _matrix(x, scale, shift, signs, left, right)
    cut = tile(len(matrix.left), len(matrix.right), x.device)
    if not cut.whole or (per_tensor and static_scale is None):
        y = _transform(x, scale, shift, signs, left, right)
        return activation.run(y, None, None, clip, static_scale, static_zero_point, bits, symmetric, per_tensor, packed)
    grid = Grid(clip, static_scale, static_zero_point, bits, symmetric)
    _whole(activation.flat(x), matrix, cut, grid, made.pointers(), None, packed)
    return made


def _whole(
    x: Tensor, matrix: _Matrix, cut: Tile, grid: Grid | None, codes: tuple[Tensor | None, ...], out: Tensor | None,
    packed: bool,
) -> None:  # fmt: skip
    """Launch the kernel that has a whole row of ``x`` [rows, columns] in hand, for ``codes`` of ``grid`` or ``out``."""
    rounding = grid or Grid(None, None, None, 8, True)
    with weight_only.on_device(x):
        _kernels().token_kernel[(len(x),)](
            x,
            *matrix.pointers(),
            rounding.clip if rounding.scale is None else None,
            rounding.scale,
            rounding.zero_point,
            *codes,
            out,
            matrix.factor,
            x.stride(0),
            LEFT=len(matrix.left),
            RIGHT=len(matrix.right),
            QUANTIZE=grid is not None,
            PACKED=packed,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **blocks(cut),
            **rounding.constants(x),
            **activation.numerics(x),
        )


def blocks(cut: Tile) -> dict[str, int]:
    """The constants of a kernel that say what it has in hand at once: of V in the first product; where it does not hold
    all of V, rows of the result in the second."""
    if cut.whole:
        return {"A": cut.a, "B": cut.b, "BLOCK_K": min(32, cut.a)}
    return {"A": cut.a, "BLOCK_N": cut.b, "BLOCK_K": 64 if cut.a <= 256 else 32, "BLOCK_M": min(64, 16384 // cut.a)}


def _by_columns(x: Tensor, matrix: _Matrix, cut: Tile, out: Tensor) -> None:
    right = len(matrix.right)
    with weight_only.on_device(x):
        _kernels().columns_kernel[(len(x), -(-right // cut.b))](
            x,
            *matrix.pointers(),
            out,
            matrix.factor,
            x.stride(0),
            LEFT=len(matrix.left),
            RIGHT=right,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **blocks(cut),
            **activation.numerics(x),
        )


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.transforms_kernels")


def _same_shape(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, signs: Tensor | None, left: Tensor | None,
    right: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _shapes_only(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, signs: Tensor | None, left: Tensor | None,
    right: Tensor | None, clip: Tensor | None, static_scale: Tensor | None, static_zero_point: Tensor | None, bits: int,
    symmetric: bool, per_tensor: bool, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return activation.empty(x, x.shape[-1], symmetric, packed)


_BEFORE = "Tensor x, Tensor? scale, Tensor? shift, Tensor? signs, Tensor? left, Tensor? right"
_apply = define(f"transform_input({_BEFORE}) -> Tensor", _transform, _same_shape, ("CUDA", "CPU"))
_quantize = define(
    f"transform_input_codes({_BEFORE}, Tensor? clip, Tensor? static_scale, Tensor? static_zero_point, int bits, "
    "bool symmetric, bool per_tensor, bool packed) -> (Tensor, Tensor, Tensor)",
    _transform_codes,
    _shapes_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
