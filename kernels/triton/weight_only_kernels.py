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

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.language import constexpr_function, jit, tl


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
def high_bit(field):
    """``layout.HIGH_BITS``."""
    return (2, 4, 6, 0, 1, 3, 5, 7)[field]


@constexpr_function
def unpack_ptx(bits, field, bf16, zero, scaled):
    """PTX that makes two weights out of two packed words.

    $0: two weights; $1: two words; $2: their high bits (3 bits); $3: what is added for the zero point, ``offset``;
    $4: scale; the last two hold their value twice. Operands that the variant does not have are not read.
    """
    # Packed bfloat16 is added and multiplied by the one instruction that sm_80 has: a * 1 + b, a * b - 0.
    add = "mov.b32 f, 0x3f803f80; fma.rn.bf16x2 v, v, f, {};" if bf16 else "add.rn.f16x2 v, v, {};"
    if bits == 8 and bf16:
        lines = _byte_to_bfloat16(field)
        if zero:
            lines.append(add.format("$3"))
    else:
        shift, position, power = _place(bits, field, bf16)
        low = ((1 << (2 if bits == 3 else bits)) - 1) << position
        # The three-input function 0xEA is (a & b) | c.
        lines = [
            f"shr.u32 v, $1, {shift};" if shift else "mov.b32 v, $1;",
            f"lop3.b32 v, v, {low * 0x10001:#x}, {power * 0x10001:#x}, 0xEA;",
        ]
        if bits == 3:  # the third bit belongs above the other two
            move = position + 2 - high_bit(field)
            lines.append(f"shl.b32 t, $2, {move};" if move >= 0 else f"shr.u32 t, $2, {-move};")
            lines.append(f"lop3.b32 v, t, {(4 << position) * 0x10001:#x}, v, 0xEA;")
        middle = (0x8000 | power | (1 << (bits - 1 + position))) * 0x10001
        lines.append("mov.b32 t, $3;" if zero else f"mov.b32 t, {middle:#x};")
        lines.append(add.format("t"))
    if scaled:
        lines.append("mov.b32 f, 0x80008000; fma.rn.bf16x2 v, v, $4, f;" if bf16 else "mul.rn.f16x2 v, v, $4;")
    return "{ .reg .b32 v, t, f, g; " + " ".join(lines) + " mov.b32 $0, v; }"


@constexpr_function
def _byte_to_bfloat16(field):
    """v = code - 128, twice. Bytes do not fit a bfloat16's mantissa, but those of 2**23 as float32 they do."""
    return [
        f"mov.b32 t, 0x4b000000; prmt.b32 f, $1, t, {0x7650 + field:#x}; prmt.b32 g, $1, t, {0x7652 + field:#x};",
        # -(2**23 + 128)
        "add.rn.f32 f, f, 0fcb000080; add.rn.f32 g, g, 0fcb000080; cvt.rn.bf16x2.f32 v, g, f;",
    ]


@constexpr_function
def nf4_ptx(bf16):
    """PTX that makes the four planes of two packed words: $0 .. $3, two levels each, out of $4.

    Bytes are looked up by ``prmt``, four codes of a word at a time, 8 of the 16 levels at a time: the codes' low three
    bits choose among 8 bytes, their high bit between the two results. Low and high bytes are then paired up.
    """
    # Low bytes of levels 0-7 and 8-15, high bytes of the same; four to a register.
    table = (
        ((0xCA063280, 0x00BA3D92), (0xAD7C25A3, 0x803910E2), (0xBEBFBFBF, 0x00BDBEBE), (0x3E3E3E3D, 0x3F3F3F3E))
        if bf16
        else ((0x52339200, 0x00D4EA8D), (0x68E02618, 0x00C9800D), (0xB6B8B9BC, 0x00ADB1B4), (0x3533312D, 0x3C393837))
    )
    lines = [
        "and.b32 s, $4, 0x77777777; shr.u32 r, s, 16; shl.b32 t, $4, 4;",
        # Of a byte this repeats the top bit: that of every second code, and of the others once they are moved up.
        "prmt.b32 m, t, $4, 0xD9C8; prmt.b32 n, t, $4, 0xFBEA;",
    ]
    for part, first in (("l", 0), ("h", 2)):
        below, above = table[first], table[first + 1]
        lines.append(f"mov.b32 t, {below[0]:#x}; mov.b32 u, {below[1]:#x}; prmt.b32 a, t, u, s; prmt.b32 b, t, u, r;")
        lines.append(f"mov.b32 t, {above[0]:#x}; mov.b32 u, {above[1]:#x}; prmt.b32 c, t, u, s; prmt.b32 d, t, u, r;")
        # (first & mask) | (second & ~mask)
        lines.append(f"lop3.b32 {part}0, c, a, m, 0xE4; lop3.b32 {part}1, d, b, n, 0xE4;")
    lines.append("prmt.b32 a, l0, h0, 0x5140; prmt.b32 b, l1, h1, 0x5140;")
    lines.append("prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;")
    lines.append("prmt.b32 c, l0, h0, 0x7362; prmt.b32 d, l1, h1, 0x7362;")
    lines.append("prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632;")
    return "{ .reg .b32 s, r, t, u, m, n, a, b, c, d, l0, l1, h0, h1; " + " ".join(lines) + " }"


@constexpr_function
def scale_ptx(bf16):
    """PTX of $0 = $1 * $2, two numbers each."""
    if bf16:
        return "{ .reg .b32 f; mov.b32 f, 0x80008000; fma.rn.bf16x2 $0, $1, $2, f; }"
    return "mul.rn.f16x2 $0, $1, $2;"


@constexpr_function
def negative_power(bits, field, bf16):
    """16 bits, as a signed number, of -(power) of ``unpack_ptx``; zero_point << position or-ed into it is added."""
    return (0x8000 | _place(bits, field, bf16)[2]) - 0x10000


@constexpr_function
def zero_shift(bits, field, bf16):
    """The position where ``negative_power`` takes a zero point."""
    return _place(bits, field, bf16)[1]


@jit
def _offset(steps, FIELD: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """[BLOCK_N] int16: bits of what ``unpack_ptx`` adds for the zero points in ``steps``."""
    zero = steps & 0xFF
    if BITS == 8 and BF16:
        offset = (128 - zero).to(tl.float32).to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        # -(power + zero point)
        offset = ((zero << zero_shift(BITS, FIELD, BF16)) | negative_power(BITS, FIELD, BF16)).to(tl.int16)
    return offset


@jit
def _scale(steps):
    """float32 scales out of ``steps``."""
    return (steps & -256).to(tl.float32, bitcast=True)


@jit
def _plane(
    words,  # [BLOCK_N, 32] int16
    high,  # [BLOCK_N, 32] int16, third bits in the low byte; with 3 bits
    steps,  # [BLOCK_N] int32
    levels_ptr,  # [16] DTYPE or None
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
):
    """[BLOCK_N, 32] DTYPE: the weights of field FIELD, without the scale unless SCALED."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if PTX and levels_ptr is not None:
        # Asked for at every field, made once: the compiler sees that it is the same.
        planes = tl.inline_asm_elementwise(
            nf4_ptx(BF16),
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        two = planes[FIELD]
        if SCALED:
            two = tl.inline_asm_elementwise(
                scale_ptx(BF16), "=r,r,r", [two, _scale(steps).to(DTYPE)[:, None]], dtype=tl.int16, is_pure=True, pack=2
            )
        value = two.to(DTYPE, bitcast=True)
    elif PTX:
        third = words
        offset = words
        factor = words
        if BITS == 3:
            third = high
        if ZERO_POINT:
            offset = _offset(steps, FIELD, BITS, BF16)[:, None]
        if SCALED:
            factor = _scale(steps).to(DTYPE)[:, None]
        two = tl.inline_asm_elementwise(
            unpack_ptx(BITS, FIELD, BF16, ZERO_POINT, SCALED),
            "=r,r,r,r,r",
            [words, third, offset, factor],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        value = two.to(DTYPE, bitcast=True)
    else:
        code = (words.to(tl.int32) >> (WIDTH * FIELD)) & ((1 << WIDTH) - 1)
        if BITS == 3:
            code = code | (((high.to(tl.int32) >> high_bit(FIELD)) & 1) << 2)
        if levels_ptr is not None:
            exact = tl.load(levels_ptr + code).to(tl.float32)
        else:
            # 2**23 + code, the same way: a conversion of integers has a quarter of the rate.
            shifted = (code | 0x4B000000).to(tl.float32, bitcast=True)
            if ZERO_POINT:
                exact = shifted - ((steps & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)[:, None]
            else:
                exact = shifted - (8388608.0 + (1 << (BITS - 1)))
        if SCALED:
            exact = exact * _scale(steps)[:, None]
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
    steps_ptr,
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
    ZERO_POINT: tl.constexpr,
    GROUP: tl.constexpr,  # columns per scale; 0: one per row
    DTYPE: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the columns of a tile
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    COLUMNS: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = COLUMNS // GROUP if (GROUP > 0 and GROUP < COLUMNS) else 1  # in a block
    PLANES: tl.constexpr = FIELDS // GROUPS  # in a group
    APART: tl.constexpr = SCALE_AFTER and GROUP > 0  # whether the sums of a group are scaled by themselves
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tile, part = tl.program_id(0), tl.program_id(1)
    row = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)  # of the weight; reads need no mask, rows are padded
    token = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < M
    x_rows = x_ptr + token.to(tl.int64)[None, :] * stride_x

    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    if GROUP == 0:
        row_steps = tl.load(steps_ptr + row)
    per_part = (blocks + SPLIT - 1) // SPLIT
    first = part * per_part
    # Given here, and not only to the launch, the number of stages holds for loads that feed no product, too.
    for block in tl.range(first, tl.minimum(first + per_part, blocks), num_stages=STAGES):
        words, high = _tile(words_ptr, high_ptr, block, row, rows, BITS)
        for group in tl.static_range(GROUPS):
            steps = tl.load(steps_ptr + (block * COLUMNS // GROUP + group) * rows + row) if GROUP > 0 else row_steps
            total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32) if APART else acc
            for plane in tl.static_range(PLANES):
                column = block * COLUMNS + (group * PLANES + plane) * 32 + tl.arange(0, 32)
                x = tl.load(
                    x_rows + column[:, None],
                    mask=(column < K)[:, None] & inside[None, :],
                    other=0.0,
                    eviction_policy="evict_last",
                )
                weight = _plane(
                    words,
                    high,
                    steps,
                    levels_ptr,
                    group * PLANES + plane,
                    BITS,
                    ZERO_POINT,
                    DTYPE,
                    not SCALE_AFTER,
                    PTX,
                )
                total = tl.dot(weight, x, total, input_precision="ieee")
            if APART:
                acc += total * _scale(steps)[:, None]
            else:
                acc = total
    if SCALE_AFTER and GROUP == 0:
        acc = acc * _scale(row_steps)[:, None]

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
    steps_ptr,
    levels_ptr,
    out_ptr,  # [N, K] DTYPE
    N,
    K,
    rows,
    BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weight itself, bit for bit what the reference multiplies by; a program writes one block of BLOCK_N rows."""
    FIELDS: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    COLUMNS: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = COLUMNS // GROUP if (GROUP > 0 and GROUP < COLUMNS) else 1
    PLANES: tl.constexpr = FIELDS // GROUPS
    block = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words, high = _tile(words_ptr, high_ptr, block, row, rows, BITS)
    for group in tl.static_range(GROUPS):
        at = row
        if GROUP > 0:
            at = ((block * COLUMNS) // GROUP + group) * rows + row
        steps = tl.load(steps_ptr + at)
        for plane in tl.static_range(PLANES):
            weight = _plane(words, high, steps, levels_ptr, group * PLANES + plane, BITS, ZERO_POINT, DTYPE, True, PTX)
            column = block * COLUMNS + (group * PLANES + plane) * 32 + tl.arange(0, 32)
            place = row.to(tl.int64)[:, None] * K + column[None, :]
            tl.store(out_ptr + place, weight, mask=(row < N)[:, None] & (column < K)[None, :])
