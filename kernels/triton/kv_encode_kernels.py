"""The Triton function that packs chunks of keys or values (NSNQuant): ``kv_encode.py`` launches it.

What is computed and what the results mean is in ``kv/nsn_encode.py``, whose names are used here. A program takes one
chunk of one head and reads it three times, the second and third time out of a cache:

    1  the range of the norms n1, and whether all numbers are finite
    2  the mean: of all tokens, for its ranges
    3  a few tokens at a time: shifted, normalised, rotated, next codewords, gain

Keys are not turned back and forth. With R(p) of position p = start + t, sums over tokens x_t = (x_a, x_b) of a pair

    mean of R(t)**-1 x_t:   a: C_a + S_b    b: C_b - S_a        C, S: means of x_t cos(t theta), x_t sin(t theta)

are turned by R(start)**-1 as one vector, and ~m by R(start) before each token subtracts R(t) of it; lengths are those
of the vectors turned back. So the table of t theta is one for all chunks.

Products run on matrix units with 16-bit numbers: what is multiplied is taken apart into high + low, both half, up to
2**-22 of its size; H is +-1 and codewords are half numbers, so products are exact, and sums are float32. In the search
the high and the low parts of eight numbers are the 16 that one instruction adds up.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.language import jit, tl


@jit
def _tokens(x_ptr, token, channel, stride, count, DIM: tl.constexpr):
    """x [tokens, channels] float32; 0 outside of the first ``count`` tokens."""
    inside = (token < count)[:, None] & (channel < DIM)[None, :]
    return tl.load(x_ptr + token[:, None] * stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def _lengths(x, DIM: tl.constexpr):
    """|x| / sqrt(d) of every token."""
    return tl.sqrt_rn(tl.sum(x * x, axis=1) / DIM)


@jit
def _range(low, high, STEPS: tl.constexpr):
    """(step, lowest value) as float16 holds them."""
    span = high - low
    step = tl.minimum(tl.maximum(tl.div_rn(span, STEPS * 1.0), 1e-5), 65504.0)
    step = tl.where(span == span, step, span)
    low = tl.minimum(tl.maximum(low, -65504.0), 65504.0)
    return step.to(tl.float16).to(tl.float32), low.to(tl.float16).to(tl.float32)


@jit
def _rounded(numbers, step, low, STEPS: tl.constexpr):
    """Codes, whole numbers in float32."""
    code = tl.minimum(tl.maximum(tl.div_rn(numbers - low, step), 0.0), STEPS * 1.0)
    return (code + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left has no fraction, halves went to even


@jit
def _norms(x, step, low, DIM: tl.constexpr):
    """(codes of n1, ~n1) of every token."""
    norms = _lengths(x, DIM)
    codes = _rounded(norms, step, low, 15)
    # A token that is there must not be divided by 0, which the lowest value is if another one is zero.
    codes = tl.where((codes * step + low < 1e-8) & (norms >= 1e-8), 1.0, codes)
    return codes, codes * step + low


@jit
def _over(held):
    """What to multiply by instead of dividing by lengths; 0 for those of zero vectors."""
    return tl.where(held < 1e-8, 0.0, tl.div_rn(1.0, tl.where(held < 1e-8, 1.0, held)))


@jit
def _nibbles(codes, HALF: tl.constexpr):
    """Whole numbers [2 * HALF] below 16 -> bytes [HALF], the first of two in the low four bits."""
    low, high = tl.split(tl.reshape(codes.to(tl.int32), [HALF, 2]))
    return (low | (high << 4)).to(tl.uint8)


@jit
def _angles(cos_ptr, sin_ptr, row, pair, inside, PAIRS: tl.constexpr):
    """cos and sin of the ``row`` and ``pair`` of tables [.., PAIRS]; channels outside are not turned."""
    cos = tl.load(cos_ptr + row * PAIRS + pair, mask=inside, other=1.0)
    return cos, tl.load(sin_ptr + row * PAIRS + pair, mask=inside, other=0.0)


@jit
def _product(x, matrix):
    """``x`` @ ``matrix``; ``x`` float32, ``matrix`` half, with the error of float32."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return tl.dot(high, matrix, tl.dot(low, matrix, input_precision="ieee"), input_precision="ieee")


@jit
def _rotated(x, matrix, TOKENS: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr):
    """H ``x`` * sqrt(d) of every token of ``x`` [TOKENS, D]."""
    if D == SIDE:
        y = _product(x, matrix)
    else:  # twice as long as the matrix F: H is F, F above F, -F
        first, second = tl.split(tl.permute(tl.reshape(x, [TOKENS, 2, SIDE]), (0, 2, 1)))
        halves = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
        y = tl.reshape(_product(tl.reshape(halves, [2 * TOKENS, SIDE]), matrix), [TOKENS, D])
    return y


@jit
def _nearest(points, codewords_ptr, half_ptr, POINTS: tl.constexpr, BLOCK: tl.constexpr):
    """(indices, <point, codeword>, |codeword|**2) of the codewords next to ``points`` [POINTS, 8]; of equals the
    lowest."""
    high = points.to(tl.float16)
    low = (points - high.to(tl.float32)).to(tl.float16)
    both = tl.reshape(tl.join(high, low), [POINTS, 16])  # high, low, high, ...
    lane, column = tl.arange(0, 16), tl.arange(0, BLOCK)
    best = tl.full([POINTS], float("-inf"), tl.float32)
    index = tl.full([POINTS], 0, tl.int32)
    for first in range(0, 256, BLOCK):
        entry = first + column
        codewords = tl.load(codewords_ptr + entry[None, :] * 8 + lane[:, None] // 2)
        half = tl.load(half_ptr + entry)
        scores = tl.dot(both, codewords, input_precision="ieee") - half[None, :]
        top = tl.max(scores, axis=1)
        found = tl.min(tl.where(scores == top[:, None], entry[None, :], 255), axis=1)
        index = tl.where(top > best, found, index)
        best = tl.maximum(best, top)
    half = tl.load(half_ptr + index)
    return index, best + half, 2.0 * half


@jit
def _at(column, place, value):
    """``value`` [n, 8] at the column ``place`` [n] of each row."""
    return tl.sum(tl.where(column[None, :] == place[:, None], value, 0), axis=1)


@jit
def _nearest_e8(points, SCALE: tl.constexpr):
    """As ``_nearest``, by the formula of ``codebooks.py``."""
    column = tl.arange(0, 8)
    sizes, negative = tl.abs(points), (points < 0.0).to(tl.int32)
    first = tl.max(sizes, axis=1)
    i = tl.min(tl.where(sizes == first[:, None], column[None, :], 7), axis=1)
    others = tl.where(column[None, :] == i[:, None], -1.0, sizes)
    second = tl.max(others, axis=1)
    j = tl.min(tl.where(others == second[:, None], column[None, :], 7), axis=1)
    least = tl.min(sizes, axis=1)
    last = tl.min(tl.where(sizes == least[:, None], column[None, :], 7), axis=1)
    odd = tl.sum(negative, axis=1) & 1

    at_low, at_high = tl.minimum(i, j), tl.maximum(i, j)
    pair = at_low * (15 - at_low) // 2 + at_high - at_low - 1  # i < j, counted in order
    pair = 4 * pair + 2 * _at(column, at_low, negative) + _at(column, at_high, negative)
    bits = tl.sum(negative << column[None, :], axis=1) ^ (odd << last)
    axis = 240 + 2 * i + _at(column, i, negative)

    index, along, energy = pair, SCALE * (first + second), tl.full(first.shape, 2.0 * SCALE * SCALE, tl.float32)
    halves = SCALE * (tl.sum(sizes, axis=1) / 2 - odd.to(tl.float32) * least)
    better = halves > along  # both have the same length
    index, along = tl.where(better, 112 + (bits & 127), index), tl.where(better, halves, along)
    single = 2.0 * SCALE * first
    better = single - 2.0 * SCALE * SCALE > along - SCALE * SCALE
    index, along = tl.where(better, axis, index), tl.where(better, single, along)
    return index, along, tl.where(better, 4.0 * SCALE * SCALE, energy)


@jit
def encode_kernel(
    x_ptr,  # [batch, heads, count, W, DIM], the last with stride 1
    matrix_ptr,  # [ORDER, ORDER] half, +-1: y = x @ it / sqrt(DIM); ORDER: DIM, or half of it above 128
    codewords_ptr,  # [256, 8] half; None: e8, by its formula
    half_ptr,  # [256] float32: |codeword|**2 / 2
    token_cos_ptr,  # [W, PAIRS] float32: of t theta
    token_sin_ptr,
    start_cos_ptr,  # [count, PAIRS] float32: of the first position of each chunk
    start_sin_ptr,
    codes_ptr,  # the parts of Chunks
    signs_ptr,
    gain_ptr,
    norm_codes_ptr,
    norm_range_ptr,
    mean_codes_ptr,
    mean_range_ptr,
    heads,
    count,
    stride_batch,
    stride_head,
    stride_chunk,
    stride_token,
    W: tl.constexpr,
    DIM: tl.constexpr,
    MEAN_BITS: tl.constexpr,  # 0: no shift
    GROUP: tl.constexpr,  # channels of the mean that share a range
    PAIRS: tl.constexpr,  # of channels that are rotated; 0: none
    INTERLEAVED: tl.constexpr,
    MAGNITUDES: tl.constexpr,  # 2 bits: signs apart
    MSE: tl.constexpr,
    E8_SCALE: tl.constexpr,
    D: tl.constexpr,  # DIM, filled up
    ROWS: tl.constexpr,  # tokens in hand at once, readings 1 and 2
    TOKENS: tl.constexpr,  # and reading 3
    BLOCK: tl.constexpr,  # codewords at once
):
    program = tl.program_id(0).to(tl.int64)
    chunk, head, batch = program % count, program // count % heads, program // count // heads
    x_ptr += batch * stride_batch + head * stride_head + chunk * stride_chunk
    channel = tl.arange(0, D)

    least, most, peak = float("inf"), float("-inf"), 0
    for start in range(0, W, ROWS):
        token = start + tl.arange(0, ROWS)
        x = _tokens(x_ptr, token, channel, stride_token, W, DIM)
        norms = _lengths(x, DIM)
        peak = tl.maximum(peak, tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0))
        least = tl.minimum(least, tl.min(tl.where(token < W, norms, float("inf")), axis=0))
        most = tl.maximum(most, tl.max(norms, axis=0))
    whole = peak < 0x7F800000
    tokens = tl.where(whole, W, 0)  # a chunk that is not finite is coded as zeros
    norm_step, norm_low = _range(tl.where(whole, least, 0.0), tl.where(whole, most, 0.0), 15)
    broken = tl.where(whole, 0.0, float("nan"))
    tl.store(norm_range_ptr + program * 2, (norm_step + broken).to(tl.float16))
    tl.store(norm_range_ptr + program * 2 + 1, (norm_low + broken).to(tl.float16))

    if PAIRS:
        turned = channel < 2 * PAIRS
        if INTERLEAVED:
            pair, partner, side = channel // 2, channel ^ 1, 1.0 - 2.0 * (channel % 2).to(tl.float32)
        else:
            ahead = channel < PAIRS
            pair, partner = tl.where(ahead, channel, channel - PAIRS), tl.where(ahead, PAIRS, -PAIRS) + channel
            side = tl.where(ahead, 1.0, -1.0)
        partner = tl.where(turned, partner, channel)
        start_cos, start_sin = _angles(start_cos_ptr, start_sin_ptr, chunk, pair, turned, PAIRS)
    if MEAN_BITS:
        along_cos, along_sin = tl.full([D], 0.0, tl.float32), tl.full([D], 0.0, tl.float32)
        for start in range(0, W, ROWS):
            token = start + tl.arange(0, ROWS)
            x = _tokens(x_ptr, token, channel, stride_token, tokens, DIM)
            held = _norms(x, norm_step, norm_low, DIM)[1]
            x = x * _over(held)[:, None]
            if PAIRS:
                inside = (token < W)[:, None] & turned[None, :]
                cos, sin = _angles(token_cos_ptr, token_sin_ptr, token[:, None], pair[None, :], inside, PAIRS)
                along_sin += tl.sum(x * sin, axis=0)
                along_cos += tl.sum(x * cos, axis=0)
            else:
                along_cos += tl.sum(x, axis=0)
        mean = along_cos / W
        if PAIRS:
            mean += side * tl.gather(along_sin, partner, 0) / W
            mean = mean * start_cos + side * tl.gather(mean, partner, 0) * start_sin
        groups = tl.reshape(mean, [D // GROUP, GROUP])
        step, low = _range(tl.min(groups, axis=1), tl.max(groups, axis=1), 2**MEAN_BITS - 1)
        codes = _rounded(groups, step[:, None], low[:, None], 2**MEAN_BITS - 1)
        shift = tl.reshape(codes * step[:, None] + low[:, None], [D])
        group = tl.arange(0, D // GROUP)
        range_ptr = mean_range_ptr + (program * (DIM // GROUP) + group) * 2
        tl.store(range_ptr, step.to(tl.float16), mask=group < DIM // GROUP)
        tl.store(range_ptr + 1, low.to(tl.float16), mask=group < DIM // GROUP)
        codes = tl.reshape(codes, [D])
        if MEAN_BITS == 8:
            tl.store(mean_codes_ptr + program * DIM + channel, codes.to(tl.int32).to(tl.uint8), mask=channel < DIM)
        else:
            couple = tl.arange(0, D // 2)
            tl.store(mean_codes_ptr + program * (DIM // 2) + couple, _nibbles(codes, D // 2), mask=couple < DIM // 2)
        if PAIRS:
            shift = shift * start_cos - side * tl.gather(shift, partner, 0) * start_sin
            across = side * tl.gather(shift, partner, 0)

    EIGHTS: tl.constexpr = D // 8
    POINTS: tl.constexpr = TOKENS * EIGHTS
    SIDE: tl.constexpr = D if D <= 128 else D // 2
    ORDER: tl.constexpr = DIM if D <= 128 else DIM // 2
    row = tl.arange(0, SIDE)
    square = (row < ORDER)[:, None] & (row < ORDER)[None, :]
    matrix = tl.load(matrix_ptr + row[:, None] * ORDER + row[None, :], mask=square, other=0.0)
    point, eighth = tl.arange(0, POINTS), tl.arange(0, EIGHTS)
    for start in range(0, W, TOKENS):
        token = start + tl.arange(0, TOKENS)
        x = _tokens(x_ptr, token, channel, stride_token, tokens, DIM)
        norm_codes, held = _norms(x, norm_step, norm_low, DIM)
        byte = start // 2 + tl.arange(0, TOKENS // 2)
        tl.store(norm_codes_ptr + program * (W // 2) + byte, _nibbles(norm_codes, TOKENS // 2), mask=byte < W // 2)
        x = x * _over(held)[:, None]
        if MEAN_BITS:
            if PAIRS:
                inside = (token < W)[:, None] & turned[None, :]
                cos, sin = _angles(token_cos_ptr, token_sin_ptr, token[:, None], pair[None, :], inside, PAIRS)
                x = x - (shift[None, :] * cos - across[None, :] * sin)
            else:
                x = x - shift[None, :]
        second = _lengths(x, DIM)
        x = x * _over(second)[:, None]
        live = (held >= 1e-8) & (second >= 1e-8)
        y = _rotated(tl.where(live[:, None], x, 0.0), matrix, TOKENS, D, SIDE) * DIM**-0.5

        points = tl.reshape(y, [POINTS, 8])
        written = (start + point // EIGHTS < W) & (point % EIGHTS < DIM // 8)
        place = (program * W + start + point // EIGHTS) * (DIM // 8) + point % EIGHTS
        if codewords_ptr is None:
            index, along, energy = _nearest_e8(points, E8_SCALE)
        else:
            sought = tl.abs(points) if MAGNITUDES else points
            index, along, energy = _nearest(sought, codewords_ptr, half_ptr, POINTS, BLOCK)
        if MAGNITUDES:
            signs = tl.sum((points >= 0.0).to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
            tl.store(signs_ptr + place, signs.to(tl.uint8), mask=written)
        tl.store(codes_ptr + place, index.to(tl.uint8), mask=written)

        counted = (eighth < DIM // 8)[None, :]
        along = tl.sum(tl.where(counted, tl.reshape(along, [TOKENS, EIGHTS]), 0.0), axis=1)
        if MSE:
            energy = tl.sum(tl.where(counted, tl.reshape(energy, [TOKENS, EIGHTS]), 0.0), axis=1)
            gain = tl.div_rn(along, tl.maximum(energy, 1e-8))
        else:
            energy = tl.sum(y * y, axis=1)
            usable = along > 1e-4 * energy
            gain = tl.where(usable, tl.div_rn(energy, tl.where(usable, along, 1.0)), 1.0)
        gain = tl.where(live, tl.minimum(gain * second, 65504.0), 0.0)
        tl.store(gain_ptr + program * W + token, gain.to(tl.float16), mask=token < W)
