"""The Triton functions for vectors of single heads, [tokens, heads, DIM]: ``heads.py`` launches them.

    turn_kernel      y = x @ matrix * factor             the matrix: one of 16-bit numbers, or the sum of two
    encode_kernel    what ``MinMax.encode`` of ``kv/quantiser.py`` stores: codes, scale and zero point of each vector

Products of 16-bit numbers are exact and added up in float32, and y is rounded once. Grids are found in float32 as
PyTorch finds them. Codes of a vector are one stream of bits in 32-bit words (``formats/packing.py``): BITS words hold
32 codes, whatever BITS is.

DIM is filled up with zeros to a power of two. With INTERPRETED bfloat16 is multiplied as float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.activation_kernels import rounded
from quantkit.kernels.triton.language import jit, tl


@jit
def _starts(row, heads, tokens, stride_batch, stride_head, stride_token):
    """Where the vectors ``row`` begin; they are counted token by token, head by head."""
    return (row // tokens // heads) * stride_batch + (row // tokens % heads) * stride_head + row % tokens * stride_token


@jit
def _operand(pointer, mask, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """What a product takes of numbers of DTYPE, 0 outside of ``mask``."""
    value = tl.load(pointer, mask=mask, other=0.0)
    return value.to(tl.float32) if INTERPRETED and tl.bfloat16 == DTYPE else value


@jit(do_not_specialize=["rows", "heads", "tokens"])
def turn_kernel(
    x_ptr,  # [batch, heads, tokens, DIM] of DTYPE with strides; the last is 1
    high_ptr,  # [DIM, DIM] of DTYPE
    low_ptr,  # the same, or None
    out_ptr,  # [rows, DIM] of DTYPE
    factor,
    rows,
    heads,
    tokens,
    stride_batch,
    stride_head,
    stride_token,
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    D: tl.constexpr,  # DIM, filled up
    ROWS: tl.constexpr,  # vectors of a program
    BLOCK_N: tl.constexpr,  # columns of y that it makes
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k, n = tl.arange(0, D), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = _starts(row, heads, tokens, stride_batch, stride_head, stride_token)
    inside = (row < rows)[:, None] & (k < DIM)[None, :]
    x = _operand(x_ptr + start[:, None] + k[None, :], inside, DTYPE, INTERPRETED)
    place, there = k[:, None] * DIM + n[None, :], (k < DIM)[:, None] & (n < DIM)[None, :]
    y = tl.full([ROWS, BLOCK_N], 0.0, tl.float32)
    if low_ptr is not None:
        y = tl.dot(x, _operand(low_ptr + place, there, DTYPE, INTERPRETED), y, input_precision="ieee")
    y = tl.dot(x, _operand(high_ptr + place, there, DTYPE, INTERPRETED), y, input_precision="ieee")
    y = rounded(y * factor, DTYPE, INTERPRETED)
    tl.store(out_ptr + row[:, None] * DIM + n[None, :], y.to(DTYPE), mask=(row < rows)[:, None] & (n < DIM)[None, :])


@jit
def _whole(value):
    """The nearest whole number of ``value`` below 2**16 in size, the even one of two; larger ones become 2**16."""
    value = tl.minimum(tl.maximum(value, -65536.0), 65536.0)
    return (value + 12582912.0) - 12582912.0  # 1.5 * 2**23: behind it a float32 has no fraction


@jit
def _grid(low, high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, RECIPROCAL: tl.constexpr):
    """(scale as float16 holds it, zero point) of ranges ``low`` <= 0 <= ``high``."""
    STEPS: tl.constexpr = (1 << (BITS - 1)) - 1 if SYMMETRIC else (1 << BITS) - 1
    empty = (low == 0.0) & (high == 0.0)
    if SYMMETRIC:
        span = tl.where(empty, 1.0 * STEPS, tl.maximum(high, -low))
    else:
        low, high = tl.where(empty, -1.0, low), tl.where(empty, 1.0, high)
        span = high - low
    # A GPU divides by a number as PyTorch does there: it multiplies by the inverse.
    scale = span * (1.0 / STEPS) if RECIPROCAL else tl.div_rn(span, 1.0 * STEPS)
    if SYMMETRIC:
        scale = tl.where(empty, 1.0, scale)
    scale = tl.minimum(tl.maximum(scale, 5.9604644775390625e-8), 65504.0).to(tl.float16).to(tl.float32)
    if SYMMETRIC:
        zero = tl.full(low.shape, 1.0 * (1 << (BITS - 1)), tl.float32)
    else:
        zero = tl.minimum(tl.maximum(_whole(tl.div_rn(-low, scale)), 0.0), 1.0 * STEPS)
    return scale, zero


@jit(do_not_specialize=["rows", "heads", "tokens"])
def encode_kernel(
    x_ptr,  # [batch, heads, tokens, DIM], half, bfloat16 or float32, with strides; the last is 1
    low_ptr,  # float: the share of the lower end of every range that is kept; None: low_share
    high_ptr,
    codes_ptr,  # [rows, WORDS] int32
    scale_ptr,  # [rows] half
    zero_ptr,  # [rows] uint8; None: symmetric
    low_share,
    high_share,
    rows,
    heads,
    tokens,
    stride_batch,
    stride_head,
    stride_token,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    D: tl.constexpr,  # DIM, filled up, 32 at least
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, D)
    start = _starts(row, heads, tokens, stride_batch, stride_head, stride_token)
    inside = (row < rows)[:, None] & (k < DIM)[None, :]
    x = tl.load(x_ptr + start[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    low *= tl.load(low_ptr).to(tl.float32) if low_ptr is not None else low_share
    high *= tl.load(high_ptr).to(tl.float32) if high_ptr is not None else high_share
    scale, zero = _grid(low, high, BITS, SYMMETRIC, RECIPROCAL)
    value = _whole(tl.div_rn(x, scale[:, None])) + zero[:, None]
    codes = tl.minimum(tl.maximum(value, 0.0), 1.0 * ((1 << BITS) - 1)).to(tl.int32)
    codes = tl.reshape(tl.where(inside, codes, 0), [ROWS, D // 32, 32])

    lane, block = tl.arange(0, 32), tl.arange(0, D // 32)
    for word in tl.static_range(BITS):
        shift = lane * BITS - 32 * word  # of a code's lowest bit in this word
        up, down = tl.minimum(tl.maximum(shift, 0), 31), tl.minimum(tl.maximum(-shift, 0), 31)
        part = (codes << up[None, None, :]) >> down[None, None, :]
        part = tl.where(((shift > -BITS) & (shift < 32))[None, None, :], part, 0)
        index = block * BITS + word
        written = (row < rows)[:, None] & (index < WORDS)[None, :]
        tl.store(codes_ptr + row[:, None] * WORDS + index[None, :], tl.sum(part, axis=2), mask=written)
    broken = tl.max((x != x).to(tl.int32), axis=1) != 0
    tl.store(scale_ptr + row, tl.where(broken, float("nan"), scale).to(tl.float16), mask=row < rows)
    if zero_ptr is not None:
        tl.store(zero_ptr + row, zero.to(tl.int32).to(tl.uint8), mask=row < rows)
