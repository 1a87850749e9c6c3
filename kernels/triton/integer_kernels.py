"""The Triton functions of the integer product: ``integer.py`` launches them, ``integer_layout.py`` says what they read.

    y[m, n] = scale_x[m] * sum_g scale_w[n, g] * sum_{k in g} (q_x[m, k] - zero_x[m]) * (q_w[n, k] - zero_w[n, g])
              + bias[n]

The inner sum is exact: int8 operands, int32 sums. With one scale per row of the weight it runs over all columns, and
what the zero points of the input take off it is exact as well,

    sum_k (q_x - zero_x) * w = sum_k q_x * w - zero_x * sum_k w        w: an operand of the weight

With groups, each group's sum (below 2**24, so exact in float32) is scaled and added up in float32, and zero_x takes off
sum_k w * scale_w, the same for every token. Zero points of the weight are subtracted from its codes in registers; those
of 8 bits, whose difference would take 9, after the product: zero_w * sum_k q_x.

The weight is the left operand, W @ x.T: its rows fill the 64 or 128 rows of a matrix instruction however few tokens
there are, and Hopper reads a left operand from registers, where unpacking leaves it. 4-bit inputs are bytes like all
others: no GPU that is made now multiplies 4-bit integers.

No launcher here: see ``weight_only_kernels.py``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

from quantkit.kernels.triton.language import constexpr_function, jit, tl


@constexpr_function
def operand_ptx(width, field, zero):
    """PTX that makes four int8 operands, $0, out of four bytes of a tile, $1; of 8 bits they are what is there.

    $2: the zero point, four times. With a zero point: code | 128 less the zero point stays within its byte, and the top
    bit turned over again makes it the signed difference. Without: the code goes to the top of its byte, where half of
    the range is the top bit (``integer_layout``: (code - 2**(width - 1)) * 2**(8 - width)).
    """
    ones = 0x01010101
    if width == 8:
        return "mov.b32 $0, $1;"
    if zero:
        move, mask = field * width, (1 << width) - 1
        first = f"shr.u32 v, $1, {move};" if move else "mov.b32 v, $1;"
        # The three-input function 0xEA is (a & b) | c.
        last = f"lop3.b32 v, v, {mask * ones:#x}, 0x80808080, 0xEA; sub.u32 v, v, $2; xor.b32 $0, v, 0x80808080;"
    else:
        move, mask = 8 - width - field * width, 256 - (1 << (8 - width))
        first = f"shl.b32 v, $1, {move};" if move else "mov.b32 v, $1;"
        # 0x6A is (a & b) ^ c
        last = f"lop3.b32 $0, v, {mask * ones:#x}, 0x80808080, 0x6A;"
    return "{ .reg .b32 v; " + first + " " + last + " }"


@constexpr_function
def unit_columns(group, columns):
    """Columns of a block of ``columns`` that share a scale; 0 columns per group: one scale per row."""
    return math.gcd(group, columns) if group else columns


@jit
def _operand(
    tile,  # [BLOCK_N, PLANE] int8
    steps,  # [BLOCK_N] int32
    FIELD: tl.constexpr,
    WIDTH: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    PTX: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """[BLOCK_N, PLANE] int8: what of field FIELD is multiplied."""
    if PTX and (WIDTH < 8 or REGISTERS):
        zero = tile
        if ZERO_POINT and WIDTH < 8:
            zero = (steps & 0xFF).to(tl.int8)[:, None]
        value = tl.inline_asm_elementwise(
            operand_ptx(WIDTH, FIELD, ZERO_POINT), "=r,r,r", [tile, zero], dtype=tl.int8, is_pure=True, pack=4
        )
    elif WIDTH == 8:
        value = tile
    elif ZERO_POINT:
        code = (tile.to(tl.int32) >> (WIDTH * FIELD)) & ((1 << WIDTH) - 1)
        value = (code - (steps & 0xFF)[:, None]).to(tl.int8)
    else:
        code = tile.to(tl.int32) << (8 - WIDTH - WIDTH * FIELD)
        value = ((code & (256 - (1 << (8 - WIDTH)))) ^ 0x80).to(tl.int8)
    return value


@jit
def _scale(steps, ZERO_POINT: tl.constexpr):
    """float32 scales out of ``steps``."""
    return ((steps & -256) if ZERO_POINT else steps).to(tl.float32, bitcast=True)


@jit
def _finished(
    acc,  # [BLOCK_N, BLOCK_M] int32 sums, with groups float32
    row,
    token,
    steps_ptr,
    sums_ptr,
    bias_ptr,
    x_scale_ptr,
    x_zero_ptr,
    x_sums_ptr,
    M,
    N,
    stride_scale,
    stride_zero,
    GROUP: tl.constexpr,
    ZERO_POINT: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32: all that is done to a tile once all columns are in."""
    inside = token < M
    x_scale = tl.load(x_scale_ptr + token * stride_scale, mask=inside, other=0.0)
    if GROUP == 0:
        steps = tl.load(steps_ptr + row)
        if x_sums_ptr is not None:
            acc -= ((steps & 0xFF) - 128)[:, None] * tl.load(x_sums_ptr + token, mask=inside, other=0)[None, :]
    if x_zero_ptr is not None:
        x_zero = tl.load(x_zero_ptr + token * stride_zero, mask=inside, other=0.0)
        if GROUP == 0:
            x_zero = tl.where(x_zero == x_zero, x_zero, 0.0)  # NaN is no integer; the scale is NaN as well then
            acc -= tl.load(sums_ptr + row)[:, None] * x_zero.to(tl.int32)[None, :]
        else:
            acc -= tl.load(sums_ptr + row)[:, None] * x_zero[None, :]
    y = acc.to(tl.float32)
    if GROUP == 0:
        y = y * _scale(steps, ZERO_POINT)[:, None]
    y = y * x_scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    return y


@jit(do_not_specialize=["M", "stride_scale", "stride_zero"])
def matmul_kernel(
    x_ptr,  # [M, K] int8, rows of stride_x, columns next to each other
    x_scale_ptr,  # [M] float32
    x_zero_ptr,  # [M] float32 or None
    x_sums_ptr,  # [groups, M] int32, sums of the codes; None but for 8-bit weights with zero points
    tiles_ptr,
    steps_ptr,
    sums_ptr,  # with x_zero_ptr
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    partial_ptr,  # [SPLIT, M, N] int32, with groups float32; with SPLIT > 1
    arrived_ptr,  # [tiles] int32, zeros before and after; with SPLIT > 1
    M,
    N,
    K,
    blocks,
    rows,
    stride_x,
    stride_scale,
    stride_zero,
    WIDTH: tl.constexpr,
    PLANE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    GROUP: tl.constexpr,  # columns per scale; 0: one per row
    SPLIT: tl.constexpr,  # programs that share the columns of a tile
    PTX: tl.constexpr,
    REGISTERS: tl.constexpr,  # sm_80 loads bytes as pairs and shuffles them, but not those that pass through PTX
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TALL: tl.constexpr,  # tiles of tokens that programs go through before they go on to other rows of the weight
):
    COLUMNS: tl.constexpr = PLANE * (8 // WIDTH)
    UNIT: tl.constexpr = unit_columns(GROUP, COLUMNS)
    PLANES: tl.constexpr = UNIT // PLANE  # that share a scale
    SUM: tl.constexpr = tl.int32 if GROUP == 0 else tl.float32
    part = tl.program_id(1)
    tile = tl.program_id(0)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    # Neighbours share a weight, and TALL * tiles_n programs the same inputs.
    above = tile // (TALL * tiles_n) * TALL
    tall = tl.minimum(tiles_m - above, TALL)
    within = tile % (TALL * tiles_n)
    row = (within // tall) * BLOCK_N + tl.arange(0, BLOCK_N)  # of the weight; reads need no mask, rows are padded
    token = ((above + within % tall) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = token < M
    x_rows = x_ptr + token[None, :] * stride_x

    acc = tl.full([BLOCK_N, BLOCK_M], 0, SUM)
    if GROUP == 0:
        row_steps = tl.load(steps_ptr + row)
    per_part = (blocks + SPLIT - 1) // SPLIT
    first = part * per_part
    for block in tl.range(first, tl.minimum(first + per_part, blocks), num_stages=STAGES):
        place = tl.cast(block, tl.int64) * rows * PLANE + (row[:, None] * PLANE + tl.arange(0, PLANE)[None, :])
        packed = tl.load(tiles_ptr + place, eviction_policy="evict_first")
        for unit in tl.static_range(COLUMNS // UNIT):
            group = 0
            if GROUP > 0:
                group = (block * COLUMNS + unit * UNIT) // GROUP
            steps = tl.load(steps_ptr + group * rows + row) if GROUP > 0 else row_steps
            total = acc if GROUP == 0 else tl.full([BLOCK_N, BLOCK_M], 0, tl.int32)
            for plane in tl.static_range(PLANES):
                column = block * COLUMNS + (unit * PLANES + plane) * PLANE + tl.arange(0, PLANE)
                x = tl.load(
                    x_rows + column[:, None],
                    mask=(column < K)[:, None] & inside[None, :],
                    other=0,
                    eviction_policy="evict_last",
                )
                weight = _operand(packed, steps, unit * PLANES + plane, WIDTH, ZERO_POINT, PTX, REGISTERS)
                total = tl.dot(weight, x, total, out_dtype=tl.int32)
            if GROUP == 0:
                acc = total
            else:
                if x_sums_ptr is not None:
                    x_sums = tl.load(x_sums_ptr + group * M + token, mask=inside, other=0)
                    total -= ((steps & 0xFF) - 128)[:, None] * x_sums[None, :]
                acc += total.to(tl.float32) * _scale(steps, ZERO_POINT)[:, None]

    place = token[None, :] * N + row[:, None]
    mask = inside[None, :] & (row < N)[:, None]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        # Past the first-level caches, which other programs do not see.
        tl.store(partial_ptr + part * size + place, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()  # all warps have written before one of them counts
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            whole = tl.full([BLOCK_N, BLOCK_M], 0, SUM)
            for other in range(SPLIT):  # in this order whoever comes last: the same sum in every run
                whole += tl.load(partial_ptr + other * size + place, mask=mask, other=0, cache_modifier=".cg")
            y = _finished(
                whole, row, token, steps_ptr, sums_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, M, N,
                stride_scale, stride_zero, GROUP, ZERO_POINT,
            )  # fmt: skip
            tl.store(out_ptr + place, y.to(DTYPE), mask=mask)
            tl.store(arrived_ptr + tile, 0)
    else:
        y = _finished(
            acc, row, token, steps_ptr, sums_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, M, N,
            stride_scale, stride_zero, GROUP, ZERO_POINT,
        )  # fmt: skip
        tl.store(out_ptr + place, y.to(DTYPE), mask=mask)


@jit(do_not_specialize=["M"])
def sums_kernel(
    x_ptr,  # [M, K] int8, rows of stride_x
    out_ptr,  # [groups, M] int32
    M,
    K,
    group_columns,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sum of a token's codes in each group of columns: a product with ones. A program adds up one group of BLOCK_M
    tokens."""
    group = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    same = tl.arange(0, 16)  # columns of the result, all alike
    first = group * group_columns
    last = tl.minimum(first + group_columns, K)
    total = tl.full([BLOCK_M, 16], 0, tl.int32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        mask = (token < M)[:, None] & (column < last)[None, :]
        x = tl.load(x_ptr + token[:, None] * stride_x + column[None, :], mask=mask, other=0)
        total = tl.dot(x, tl.full([BLOCK_K, 16], 1, tl.int8), total, out_dtype=tl.int32)
    place = out_ptr + group * M + token[:, None] + same[None, :]
    tl.store(place, total, mask=(token < M)[:, None] & (same == 0)[None, :])
