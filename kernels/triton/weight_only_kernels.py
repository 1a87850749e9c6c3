"""The Triton functions of the weight-only product: ``weight_only.py`` launches them, ``layout.py`` says what they read.

    y[m, n] = sum_k x[m, k] * (code[n, k] - zero_point[n, g(k)]) * scale[n, g(k)] + bias[n]      g(k): the group of k

The weight is the left operand of the matrix instruction, W @ x.T: rows of W fill its 64 or 128 rows however few tokens
there are, and Hopper reads a left operand from registers, where unpacking leaves it. A tile of words is read once;
each of its fields is a plane of 32 columns and one product.

Subtracting the zero point is exact (integers below 257 in magnitude are exact in half and bfloat16) and comes before
anything is rounded: folded into a rounded constant, base + zero point would cost half a step of the grid. The scale is
applied to the float32 sums of each group (``SCALE_AFTER``; integers meet the instruction: for few tokens), or to the
weight before, which then equals the reference's bit for bit (fewer operations where tokens outnumber groups).

No launcher here: whether a function is compiled or interpreted is settled when it is decorated, and tests load this
file a second time to interpret it.
"""

from __future__ import annotations

from quantkit.kernels.triton.compat import constexpr_function, jit, tl


@constexpr_function
def _place(bits: int, field: int, bf16: bool) -> tuple[int, int, int]:
    """How field ``field`` of a word becomes a float: (shift right, bit position then, bits of the power of two).

    A code or-ed into the mantissa of a power of two, ``position`` bits up, is that power plus the code; a lower power
    for a higher position. Most fields need no shift.
    """
    width = 2 if bits == 3 else bits
    mantissa, bias, unit = (7, 127, {4: 4, 2: 6}) if bf16 else (10, 15, {8: 8, 4: 8, 2: 8})
    position = (field * width) % unit[width]
    return field * width - position, position, (bias + mantissa - position) << mantissa


@constexpr_function
def unpack_ptx(bits, field, bf16, zero, scaled):
    """PTX that makes two weights out of two packed words.

    $0: two weights; $1: two words; $2: their high bits (3 bits); $3: -(power + zero point), $4: scale, both twice.
    Operands that the variant does not have are not read. Not for 8 bits in bfloat16, whose mantissa has 7.
    """
    shift, position, power = _place(bits, field, bf16)
    low = ((1 << (2 if bits == 3 else bits)) - 1) << position
    # The three-input function 0xEA is (a & b) | c.
    lines = [
        ".reg .b32 v, t;",
        f"shr.u32 v, $1, {shift};" if shift else "mov.b32 v, $1;",
        f"lop3.b32 v, v, {low * 0x10001:#x}, {power * 0x10001:#x}, 0xEA;",
    ]
    if bits == 3:  # bit ``field`` of the high bits belongs above the two low ones
        move = position + 2 - field
        lines.append(f"shl.b32 t, $2, {move};" if move >= 0 else f"shr.u32 t, $2, {-move};")
        lines.append(f"lop3.b32 v, t, {(4 << position) * 0x10001:#x}, v, 0xEA;")
    middle = (0x8000 | power | (1 << (bits - 1 + position))) * 0x10001
    lines.append("mov.b32 t, $3;" if zero else f"mov.b32 t, {middle:#x};")
    result = "v" if scaled else "$0"
    if bf16:  # sm_80 adds and multiplies packed bfloat16 by this instruction only: v * 1 + t, v * scale - 0
        lines.append(f".reg .b32 c; mov.b32 c, 0x3f803f80; fma.rn.bf16x2 {result}, v, c, t;")
        lines.append("mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, v, $4, c;" if scaled else "")
    else:
        lines.append(f"add.rn.f16x2 {result}, v, t;")
        lines.append("mul.rn.f16x2 $0, v, $4;" if scaled else "")
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def negative_power(bits, field, bf16):
    """16 bits, as a signed number, of -(power) of ``unpack_ptx``; zero_point << position or-ed into it is added."""
    return (0x8000 | _place(bits, field, bf16)[2]) - 0x10000


@constexpr_function
def zero_shift(bits, field, bf16):
    """The position where ``negative_power`` takes a zero point."""
    return _place(bits, field, bf16)[1]


@jit
def _plane(
    words,  # [BLOCK_N, 32] int16
    high,  # [BLOCK_N, 32] int16, third bits in the low byte; with 3 bits
    zero,  # [BLOCK_N] uint8 or None
    scale,  # [BLOCK_N]; with SCALED
    levels_ptr,  # [16] DTYPE or None
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
):
    """[BLOCK_N, 32] DTYPE: the weights of field FIELD, without the scale unless SCALED."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    if PTX and levels_ptr is None:
        BF16: tl.constexpr = DTYPE == tl.bfloat16
        third = words
        minus = words
        factor = words
        if BITS == 3:
            third = high
        if zero is not None:
            power: tl.constexpr = negative_power(BITS, FIELD, BF16)
            minus = ((zero.to(tl.int16) << zero_shift(BITS, FIELD, BF16)) | power)[:, None]
        if SCALED:
            factor = scale[:, None]
        two = tl.inline_asm_elementwise(
            unpack_ptx(BITS, FIELD, BF16, zero is not None, SCALED),
            "=r,r,r,r,r",
            [words, third, minus, factor],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        value = two.to(DTYPE, bitcast=True)
    else:
        code = (words.to(tl.int32) >> (WIDTH * FIELD)) & ((1 << WIDTH) - 1)
        if BITS == 3:
            code = code | (((high.to(tl.int32) >> FIELD) & 1) << 2)
        if levels_ptr is not None:
            exact = tl.load(levels_ptr + code).to(tl.float32)
        else:
            # 2**23 + code, the same way: a conversion of integers has a quarter of the rate.
            shifted = (code | 0x4B000000).to(tl.float32, bitcast=True)
            if zero is not None:
                exact = shifted - (zero.to(tl.float32) + 8388608.0)[:, None]
            else:
                exact = shifted - (8388608.0 + (1 << (BITS - 1)))
        if SCALED:
            exact = exact * scale.to(tl.float32)[:, None]
        value = exact.to(DTYPE)
    return value


@jit
def _tile(words_ptr, high_ptr, block, row, rows, BITS: tl.constexpr):
    """(words, high bits) [BLOCK_N, 32] int16 of ``block`` at the rows ``row`` [BLOCK_N]."""
    place = tl.cast(block, tl.int64) * rows * 32 + (row[:, None] * 32 + tl.arange(0, 32)[None, :])
    words = tl.load(words_ptr + place, eviction_policy="evict_first")
    high = words
    if BITS == 3:
        high = tl.load(high_ptr + place, eviction_policy="evict_first").to(tl.int16)
    return words, high


@jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr,  # [M, K] DTYPE, rows of stride_x, columns next to each other
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    levels_ptr,
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    partial_ptr,  # [SPLIT, M, N] float32; with SPLIT > 1
    arrived_ptr,  # [tiles] int32, zeros before and after; with SPLIT > 1
    M,
    N,
    K,
    blocks,
    rows,
    stride_x,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns per scale; 0: one per row
    DTYPE: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the columns of a tile
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    COLUMNS: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = COLUMNS // GROUP if 0 < GROUP < COLUMNS else 1  # in a block
    PLANES: tl.constexpr = FIELDS // GROUPS  # in a group
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tile, part = tl.program_id(0), tl.program_id(1)
    row = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)  # of the weight; reads need no mask, rows are padded
    token = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < M
    x_rows = x_ptr + token.to(tl.int64)[None, :] * stride_x

    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    if GROUP == 0:
        row_scale = tl.load(scale_ptr + row)
        if zero_ptr is not None:
            row_zero = tl.load(zero_ptr + row)
    per_part = (blocks + SPLIT - 1) // SPLIT
    first = part * per_part
    for block in range(first, tl.minimum(first + per_part, blocks)):
        words, high = _tile(words_ptr, high_ptr, block, row, rows, BITS)
        for group in tl.static_range(GROUPS):
            zero = None
            if GROUP > 0:
                at = ((block * COLUMNS) // GROUP + group) * rows + row
                scale = tl.load(scale_ptr + at)
                if zero_ptr is not None:
                    zero = tl.load(zero_ptr + at)
            else:
                scale = row_scale
                if zero_ptr is not None:
                    zero = row_zero
            APART: tl.constexpr = SCALE_AFTER and GROUP > 0  # sums of a group, to be scaled
            if APART:
                total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
            else:
                total = acc
            for plane in tl.static_range(PLANES):
                column = block * COLUMNS + (group * PLANES + plane) * 32 + tl.arange(0, 32)
                x = tl.load(
                    x_rows + column[:, None],
                    mask=(column < K)[:, None] & inside[None, :],
                    other=0.0,
                    eviction_policy="evict_last",
                )
                weight = _plane(
                    words, high, zero, scale, levels_ptr, BITS, group * PLANES + plane, DTYPE, not SCALE_AFTER, PTX
                )
                total = tl.dot(weight, x, total, input_precision="ieee")
            if APART:
                acc += total * scale.to(tl.float32)[:, None]
            else:
                acc = total
    if SCALE_AFTER and GROUP == 0:
        acc = acc * scale.to(tl.float32)[:, None]

    place = token.to(tl.int64)[None, :] * N + row[:, None]
    mask = inside[None, :] & (row < N)[:, None]
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        # Past the first-level caches, which other programs do not see.
        tl.store(partial_ptr + part * size + place, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()  # all warps have written before one of them counts
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
            for other in range(SPLIT):  # in this order whoever comes last: the same sum in every run
                total += tl.load(partial_ptr + other * size + place, mask=mask, other=0.0, cache_modifier=".cg")
            if bias_ptr is not None:
                total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + place, total.to(DTYPE), mask=mask)
            tl.store(arrived_ptr + tile, 0)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + place, acc.to(DTYPE), mask=mask)


@jit
def dequantize_kernel(
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    levels_ptr,
    out_ptr,  # [N, K] DTYPE
    N,
    K,
    rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weight itself, bit for bit what the reference multiplies by; a program writes one block of BLOCK_N rows."""
    FIELDS: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    COLUMNS: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = COLUMNS // GROUP if 0 < GROUP < COLUMNS else 1
    PLANES: tl.constexpr = FIELDS // GROUPS
    block = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words, high = _tile(words_ptr, high_ptr, block, row, rows, BITS)
    for group in tl.static_range(GROUPS):
        zero = None
        at = row
        if GROUP > 0:
            at = ((block * COLUMNS) // GROUP + group) * rows + row
        scale = tl.load(scale_ptr + at)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + at)
        for plane in tl.static_range(PLANES):
            weight = _plane(words, high, zero, scale, levels_ptr, BITS, group * PLANES + plane, DTYPE, True, PTX)
            column = block * COLUMNS + (group * PLANES + plane) * 32 + tl.arange(0, 32)
            place = row.to(tl.int64)[:, None] * K + column[None, :]
            tl.store(out_ptr + place, weight, mask=(row < N)[:, None] & (column < K)[None, :])
