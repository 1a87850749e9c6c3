"""The Triton functions that multiply activations by a Kronecker product: ``transforms.py`` launches them.

    y = left.T @ V @ right        V [LEFT, RIGHT]: a row of x' = (x * scale + shift) * signs

Factors and x' have 16 bits, their products are exact and added up in float32. What the second product reads, U, is
float32; it is taken apart into two numbers of 16 bits, U = high + low up to 2**-17 (bfloat16) or 2**-22 (half) of its
size, for two products on the matrix units. Half numbers end at 65504, so there U is first brought to a known size by a
power of two. y is rounded once, and ``activation_kernels.py`` turns it into codes.

A Hadamard matrix is such a product of two smaller ones, each 16-bit numbers +-1, and ``factor`` is 1 / sqrt(n).

Sides are filled up with zeros to powers of two of at least 16. With INTERPRETED bfloat16 is multiplied as float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.activation_kernels import (
    changed,
    codes_of,
    extent,
    given_grid,
    grid,
    rounded,
    store_codes,
    store_grid,
)
from quantkit.kernels.triton.language import jit, tl


@jit
def _operand(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``value``, float32 that holds numbers of DTYPE, as what a product takes."""
    return value if INTERPRETED and tl.bfloat16 == DTYPE else value.to(DTYPE)


@jit
def _parts(u, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """(high, low, size): u = (high + low) * size, high and low of DTYPE."""
    size = 1.0
    if tl.float16 == DTYPE:
        peak = tl.max(tl.max(u.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
        exponent = tl.maximum(peak >> 23, 14)
        u = u * ((267 - exponent) << 23).to(tl.float32, bitcast=True)  # the largest is 2**13 and more, not 2**14
        size = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
    high = rounded(u, DTYPE, INTERPRETED)
    low = rounded(u - high, DTYPE, INTERPRETED)
    return _operand(high, DTYPE, INTERPRETED), _operand(low, DTYPE, INTERPRETED), size


@jit
def _matrix(pointer, rows, columns, SIZE: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The elements at ``rows`` and ``columns`` of a matrix [SIZE, SIZE], 0 outside of it."""
    there = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    value = tl.load(pointer + rows[:, None] * SIZE + columns[None, :], mask=there, other=0.0)
    return _operand(value.to(tl.float32), DTYPE, INTERPRETED)


@jit
def token_kernel(
    x_ptr,  # [rows, LEFT * RIGHT] of DTYPE, rows of stride_x, columns next to each other
    scale_ptr,  # [LEFT * RIGHT] or None
    shift_ptr,
    signs_ptr,  # int8
    left_ptr,  # [LEFT, LEFT] of DTYPE
    right_ptr,  # [RIGHT, RIGHT]
    clip_ptr,  # these to row_zero_ptr as in activation_kernels.quantize_kernel
    given_scale_ptr,
    given_zero_ptr,
    codes_ptr,
    row_scale_ptr,
    row_zero_ptr,
    out_ptr,  # [rows, LEFT * RIGHT] of DTYPE; without QUANTIZE, and of the pointers above it none from clip_ptr on
    factor,  # y is multiplied by it
    stride_x,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr,
    PACKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    A: tl.constexpr,  # LEFT and RIGHT, filled up
    B: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows of V in hand at once
):
    """A program takes one row as a whole: nothing of it passes through memory between its load and its codes."""
    row = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, A), tl.arange(0, B)
    inside = (i < LEFT)[:, None] & (j < RIGHT)[None, :]
    place = i[:, None] * RIGHT + j[None, :]
    u = tl.full([A, B], 0.0, tl.float32)
    for start in range(0, LEFT, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < LEFT)[:, None] & (j < RIGHT)[None, :]
        at = k[:, None] * RIGHT + j[None, :]
        v = tl.load(x_ptr + row * stride_x + at, mask=there, other=0.0).to(tl.float32)
        v = changed(v, at, there, scale_ptr, shift_ptr, signs_ptr, DTYPE, INTERPRETED)
        left = tl.trans(_matrix(left_ptr, k, i, LEFT, DTYPE, INTERPRETED))
        u = tl.dot(left, _operand(v, DTYPE, INTERPRETED), u, input_precision="ieee")
    high, low, size = _parts(u, DTYPE, INTERPRETED)
    right = _matrix(right_ptr, j, j, RIGHT, DTYPE, INTERPRETED)
    y = tl.dot(high, right, tl.dot(low, right, input_precision="ieee"), input_precision="ieee")
    y = rounded(y * size * factor, DTYPE, INTERPRETED)
    if QUANTIZE:
        SHARE: tl.constexpr = 2 if PACKED else 1  # codes of a byte
        if OWN:
            low_end, high_end, peak = extent(y, (not SYMMETRIC) or clip_ptr is not None)
            step, zero = grid(low_end, high_end, peak, clip_ptr, BITS, SYMMETRIC, RECIPROCAL, EPS, DTYPE, INTERPRETED)
        else:
            step, zero = given_grid(given_scale_ptr, given_zero_ptr)
        codes, value = codes_of(y, step, zero, BITS, SYMMETRIC, DTYPE, INTERPRETED)
        broken = 0
        if not OWN:
            broken = tl.max(tl.max(((value != value) & inside).to(tl.int32), axis=1), axis=0)
        unit = tl.arange(0, B // SHARE)
        written = (i < LEFT)[:, None] & (unit < RIGHT // SHARE)[None, :]
        where = i[:, None] * (RIGHT // SHARE) + unit[None, :]
        store_codes(codes_ptr + row * (LEFT * RIGHT // SHARE), where, written, codes, A, B, PACKED)
        store_grid(row_scale_ptr, row_zero_ptr, row, step, zero, broken)
    else:
        tl.store(out_ptr + row * (LEFT * RIGHT) + place, y.to(DTYPE), mask=inside)


@jit
def columns_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    signs_ptr,
    left_ptr,
    right_ptr,
    out_ptr,  # [rows, LEFT * RIGHT] of DTYPE
    factor,
    stride_x,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    A: tl.constexpr,  # LEFT, filled up
    BLOCK_N: tl.constexpr,  # columns of y that a program makes
    BLOCK_K: tl.constexpr,  # columns of V in hand at once
    BLOCK_M: tl.constexpr,  # rows of y made at once; divides A
):
    """For rows too long for ``token_kernel``: a program makes a few columns of y = left.T @ (V @ right)."""
    row = tl.program_id(0).to(tl.int64)
    i, n = tl.arange(0, A), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    u = tl.full([A, BLOCK_N], 0.0, tl.float32)
    for start in range(0, RIGHT, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (i < LEFT)[:, None] & (k < RIGHT)[None, :]
        place = i[:, None] * RIGHT + k[None, :]
        v = tl.load(x_ptr + row * stride_x + place, mask=inside, other=0.0).to(tl.float32)
        v = changed(v, place, inside, scale_ptr, shift_ptr, signs_ptr, DTYPE, INTERPRETED)
        right = _matrix(right_ptr, k, n, RIGHT, DTYPE, INTERPRETED)
        u = tl.dot(_operand(v, DTYPE, INTERPRETED), right, u, input_precision="ieee")
    high, low, size = _parts(u, DTYPE, INTERPRETED)
    for start in range(0, LEFT, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        left = tl.trans(_matrix(left_ptr, i, m, LEFT, DTYPE, INTERPRETED))
        y = tl.dot(left, high, tl.dot(left, low, input_precision="ieee"), input_precision="ieee")
        y = rounded(y * size * factor, DTYPE, INTERPRETED)
        where = out_ptr + row * (LEFT * RIGHT) + m[:, None] * RIGHT + n[None, :]
        tl.store(where, y.to(DTYPE), mask=(m < LEFT)[:, None] & (n < RIGHT)[None, :])
