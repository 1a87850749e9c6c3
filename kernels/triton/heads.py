"""Keys and values of single heads on GPUs, through Triton: turned by a matrix, and turned into codes.

    multiply    x @ M for x [..., head_dim]: the Hadamard matrix, or the learned one, in front of the quantiser of keys
                (QuaRot, arXiv 2404.00456: R3; FlatQuant, arXiv 2410.09426: P_k), and its inverse
    encode      what ``MinMax.encode`` of ``kv/quantiser.py`` stores, packed

Products are those of ``kernels/online.py`` but for the order of sums, and, where 16-bit numbers do not hold M, the
2**-17 (bfloat16) or 2**-22 (half) of it that two of them together leave out. Codes are those of the reference.
A launch neither allocates an unknown size nor waits for the device.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.formats.packing import words_per_row
from quantkit.kernels.library import define
from quantkit.kernels.triton import compat, weight_only

LARGEST = 256
"""Numbers of a head."""
_NOTHING = 2.0**-30
"""Of the largest number of a matrix: what is less is left by computing it."""


class Matrix(NamedTuple):
    """M = (high + low) * factor, as a kernel for inputs of its dtype takes it."""

    high: Tensor
    """[head_dim, head_dim]"""
    low: Tensor | None
    """None: ``high`` is all."""
    factor: float


def matrix_of(dense: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Matrix:
    """``dense`` [head_dim, head_dim], float32 or float64, for inputs of ``dtype``.

    Args:
        factor: M is that many times what is held; 1 / sqrt(head_dim) leaves whole numbers of a Hadamard matrix.
    """
    with torch.inference_mode(False), torch.no_grad():
        held = dense / factor
        high = held.to(dtype)
        low = (held - high).to(dtype)
        exact = bool(low.abs().max() <= _NOTHING * high.abs().max())
        return Matrix(high.contiguous(), None if exact else low.contiguous(), factor)


def turns(x: Tensor) -> bool:
    """Does ``multiply`` take ``x`` [..., head_dim]?"""
    return x.dtype in (torch.float16, torch.bfloat16) and _runs(x)


def encodes(x: Tensor) -> bool:
    """Does ``encode`` take ``x`` [batch, heads, tokens, head_dim]?"""
    return x.dtype in (torch.float16, torch.bfloat16, torch.float32) and _runs(x)


def _runs(x: Tensor) -> bool:
    able = x.is_cuda and compat.AVAILABLE and 0 < x.shape[-1] <= LARGEST
    return able and weight_only.incapable(x.device) is None


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    """``x`` @ M for ``x`` [..., head_dim], in its dtype, which is that of M."""
    y: Tensor = _multiply_op(x, matrix.high, matrix.low, matrix.factor)
    return y


def encode(x: Tensor, bits: int, symmetric: bool, low: float | Tensor, high: float | Tensor) -> dict[str, Tensor]:
    """``codes``, ``scale`` and ``zero_point`` of ``x`` [batch, heads, tokens, head_dim] as ``MinMax.encode`` has them.

    Args:
        low: share of the lower end of every range that is kept; a tensor of one number, on the device of x.
    """
    ends = [(end, 1.0) if isinstance(end, Tensor) else (None, end) for end in (low, high)]
    (low_tensor, low_share), (high_tensor, high_share) = ends
    codes, scale, zero_point = _encode_op(x, low_tensor, high_tensor, low_share, high_share, bits, symmetric)
    parts = {"codes": codes, "scale": scale}
    return parts if symmetric else parts | {"zero_point": zero_point}


class Vectors(NamedTuple):
    """x [batch, heads, tokens, head_dim] as kernels are given it."""

    x: Tensor
    sizes: tuple[int, ...]
    """Vectors, heads, tokens, and strides of batch, heads and tokens."""


def vectors(x: Tensor) -> Vectors:
    """``x`` [..., head_dim], copied if a vector does not lie in one piece."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    four = x if x.dim() == 4 else x.reshape(1, 1, -1, x.shape[-1])
    return Vectors(four, (four.shape[:3].numel(), four.shape[1], four.shape[2], *four.stride()[:3]))


class Tile(NamedTuple):
    """What a program has in hand."""

    dim: int
    """head_dim, filled up."""
    rows: int
    """Vectors."""
    columns: int
    """Of the product."""
    warps: int


def tile(head_dim: int, rows: int, product: bool) -> Tile:
    """Few vectors, as while tokens are generated, are spread over programs; matrix units take 16 at least."""
    dim = max(32, 1 << (head_dim - 1).bit_length())
    if product:
        return Tile(dim, 64 if rows > 4096 else 16, min(dim, 64), 4)
    return Tile(dim, 2048 // dim if rows > 4096 else 1, dim, 4 if rows > 4096 else 1)


def _multiply(x: Tensor, high: Tensor, low: Tensor | None, factor: float) -> Tensor:
    """The operator ``quantkit::turn_heads``: arguments as in ``Matrix``."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    four, sizes = vectors(x)
    dim = x.shape[-1]
    cut = tile(dim, sizes[0], product=True)
    with weight_only.on_device(x):
        _kernels().turn_kernel[(-(-sizes[0] // cut.rows), cut.dim // cut.columns)](
            four,
            high,
            low,
            out,
            factor,
            *sizes,
            DIM=dim,
            DTYPE=weight_only.triton_dtype(x.dtype),
            INTERPRETED=not x.is_cuda,
            D=cut.dim,
            ROWS=cut.rows,
            BLOCK_N=cut.columns,
            num_warps=cut.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return out


def _room(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point, this of no number where there is none."""
    outer = x.shape[:-1]
    return (
        x.new_empty(*outer, words_per_row(x.shape[-1], bits), dtype=torch.int32),
        x.new_empty(*outer, 1, dtype=torch.float16),
        x.new_empty(*outer, 0 if symmetric else 1, dtype=torch.uint8),
    )


def _encode(
    x: Tensor, low: Tensor | None, high: Tensor | None, low_share: float, high_share: float, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``quantkit::encode_heads``: arguments as in ``encode``."""
    codes, scale, zero_point = _room(x, bits, symmetric)
    if x.numel() == 0:
        return codes, scale, zero_point
    four, sizes = vectors(x)
    cut = tile(x.shape[-1], sizes[0], product=False)
    with weight_only.on_device(x):
        _kernels().encode_kernel[(-(-sizes[0] // cut.rows),)](
            four,
            low,
            high,
            codes,
            scale,
            None if symmetric else zero_point,
            low_share,
            high_share,
            *sizes,
            DIM=x.shape[-1],
            WORDS=codes.shape[-1],
            BITS=bits,
            SYMMETRIC=symmetric,
            RECIPROCAL=x.is_cuda,
            D=cut.dim,
            ROWS=cut.rows,
            num_warps=cut.warps,
            num_stages=1,
            enable_fp_fusion=False,  # as PyTorch rounds
        )
    return codes, scale, zero_point


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.heads_kernels")


def _same_shape(x: Tensor, high: Tensor, low: Tensor | None, factor: float) -> Tensor:
    return x.new_empty(x.shape)


def _shapes_only(
    x: Tensor, low: Tensor | None, high: Tensor | None, low_share: float, high_share: float, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _room(x, bits, symmetric)


_multiply_op = define(
    "turn_heads(Tensor x, Tensor high, Tensor? low, float factor) -> Tensor", _multiply, _same_shape, ("CUDA", "CPU")
)
_encode_op = define(
    "encode_heads(Tensor x, Tensor? low, Tensor? high, float low_share, float high_share, int bits, bool symmetric) "
    "-> (Tensor, Tensor, Tensor)",
    _encode,
    _shapes_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
