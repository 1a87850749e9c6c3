"""The Triton functions of attention over packed NSNQuant keys and values: ``kv_attention.py`` launches them.

With the names of ``kv/nsn_encode.py``, for a query q and weights p_t:

    <q, k_t>       = ~n1_t ( g_t <H q, q_t> + <q, R(p_t) ~m> )
    sum_t p_t v_t  = H.T sum_t (p_t ~n1_t g_t) q_t + sum over chunks of (sum_t p_t ~n1_t) ~m

(Son et al., NSNQuant, arXiv 2505.18231, section 3). The tokens of a head are shared between programs; each of the first
``coded`` takes some chunks, each of the others some of the tokens that are held as they came. What a program has summed
up goes to a workspace with its largest logit, and ``merge_kernel`` puts the programs together in a fixed order.

A tile is the W tokens of a chunk, so a mean, and R of its first position, is wanted once for each; the angles within a
chunk are the same for all. Tokens are the left operand of the matrix instruction and queries the right one, which may
be as narrow as 8: the queries that share a head are few.

Codewords are half numbers, and what they are multiplied by is rounded to half after it was divided by its largest, so
nothing overflows. Those sums lie in float32, as does everything else.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.language import jit, tl


@jit
def _row_maximum(tile):
    """[columns] of ``tile`` [rows, columns]: the largest magnitudes; never 0."""
    return tl.maximum(tl.max(tl.abs(tile), axis=0), 1e-30)


@jit
def _bytes(pointer, eighth, EIGHTHS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """uint8 [TOKENS, EIGHTHS] at ``pointer`` as int32 [TOKENS, BLOCK]."""
    place = tl.arange(0, TOKENS)[:, None] * EIGHTHS + eighth[None, :]
    if BLOCK == EIGHTHS:
        return tl.load(pointer + place).to(tl.int32)
    else:
        return tl.load(pointer + place, mask=(eighth < EIGHTHS)[None, :], other=0).to(tl.int32)


@jit
def _codewords(
    codes_ptr,
    signs_ptr,
    book_ptr,
    flips_ptr,
    chunk,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """q_t of the tokens of ``chunk``, [W, BLOCK]; behind DIM anything that is finite."""
    EIGHTHS: tl.constexpr = DIM // 8
    eighth = tl.arange(0, BLOCK // 8)
    codes = _bytes(codes_ptr + chunk * (W * EIGHTHS), eighth, EIGHTHS, BLOCK // 8, W)
    if signs_ptr is None:
        words = tl.load(book_ptr + codes[:, :, None] * 8 + tl.arange(0, 8)[None, None, :])
    else:
        # Two numbers at a time, whose signs are two bits.
        entry = tl.arange(0, 4)[None, None, :]
        signs = _bytes(signs_ptr + chunk * (W * EIGHTHS), eighth, EIGHTHS, BLOCK // 8, W)
        pairs = tl.load(book_ptr + codes[:, :, None] * 4 + entry)
        pairs ^= tl.load(flips_ptr + signs[:, :, None] * 4 + entry)
        words = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(tl.float16, bitcast=True)
    return tl.reshape(words, [W, BLOCK]).to(DTYPE)


@jit
def _norms(codes_ptr, range_ptr, chunk, W: tl.constexpr):
    """~n1 of the tokens of ``chunk``, [W], and what none exceeds."""
    token = tl.arange(0, W)
    codes = (tl.load(codes_ptr + chunk * (W // 2) + token // 2).to(tl.int32) >> (token % 2 * 4)) & 15
    step = tl.load(range_ptr + chunk * 2).to(tl.float32)
    low = tl.load(range_ptr + chunk * 2 + 1).to(tl.float32)
    return codes.to(tl.float32) * step + low, tl.maximum(low + 15 * step, 1e-30)


@jit
def _mean(codes_ptr, range_ptr, chunk, channel, inside, DIM: tl.constexpr, GROUP_DIM: tl.constexpr, BITS: tl.constexpr):
    """~m of ``chunk`` at ``channel``, 0 where that is not ``inside``."""
    if BITS == 8:
        codes = tl.load(codes_ptr + chunk * DIM + channel, mask=inside, other=0).to(tl.int32)
    else:
        pair = tl.load(codes_ptr + chunk * (DIM // 2) + channel // 2, mask=inside, other=0).to(tl.int32)
        codes = (pair >> (channel % 2 * 4)) & 15
    place = range_ptr + (chunk * (DIM // GROUP_DIM) + channel // GROUP_DIM) * 2
    step = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return codes.to(tl.float32) * step + tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)


@jit
def _mean_bound(range_ptr, chunk, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """What no channel of ~m exceeds."""
    group = tl.arange(0, BLOCK)
    place = range_ptr + (chunk * GROUPS + group) * 2
    step = tl.load(place, mask=group < GROUPS, other=0.0).to(tl.float32)
    low = tl.load(place + 1, mask=group < GROUPS, other=0.0).to(tl.float32)
    return tl.maximum(tl.max(tl.maximum(tl.abs(low), tl.abs(low + step * (2**BITS - 1))), axis=0), 1e-30)


@jit
def _seen(
    logits,  # [tokens, queries]
    mask_ptr,
    token,  # [tokens]: where the mask's numbers are
    query,  # [queries]: the same, in addition
    softcap,
    CAPPED: tl.constexpr,
    ADDED: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """``logits`` with the cap and the mask."""
    if CAPPED:
        logits = softcap - 2.0 * softcap / (1.0 + tl.exp(logits * (2.0 / softcap)))  # softcap * tanh
    if mask_ptr is not None:
        place = token[:, None] + query[None, :] if BY_HEAD else token[:, None]
        mask = tl.load(mask_ptr + place)
        logits = logits + mask.to(tl.float32) if ADDED else tl.where(mask != 0, logits, float("-inf"))
    return logits


@jit(do_not_specialize=[  # what changes from token to token: nothing is compiled for one of its values
    "chunks", "taken", "coded", "sinks", "tails", "key_room", "value_room", "first", "mask_batch", "mask_head",
])  # fmt: skip
def split_kernel(
    q_ptr,  # [rows * GROUP, DK] of the model's dtype; a row is a head of the keys of a sequence
    turned_ptr,  # [rows * GROUP, DK] float32: H q
    mask_ptr,  # uint8 or numbers to be added, strides below; or None
    # Of keys and of values, as in ``Chunks`` and ``View``, with room for more chunks behind each row; without CODED the
    # first seven are None. Means are None where there is no shift, signs with 1 bit.
    key_codes_ptr,
    key_signs_ptr,
    key_gain_ptr,
    key_norm_codes_ptr,
    key_norm_range_ptr,
    key_mean_codes_ptr,
    key_mean_range_ptr,
    key_sink_ptr,
    key_tail_ptr,
    key_book_ptr,  # [256, 8] half; with 2 bits as [256, 4] int32
    value_codes_ptr,
    value_signs_ptr,
    value_gain_ptr,
    value_norm_codes_ptr,
    value_norm_range_ptr,
    value_mean_codes_ptr,
    value_mean_range_ptr,
    value_sink_ptr,
    value_tail_ptr,
    value_book_ptr,
    flips_ptr,  # [256, 4] int32: the sign bits of the numbers of which a byte of signs says that they are negative
    waves_ptr,  # [2, W, ROTARY / 2] float32: cosines and sines of the angles within a chunk
    starts_ptr,  # [.., ROTARY] float32: cosines and sines at the first token of a chunk
    sums_ptr,  # [rows, splits, 2, GROUP, DV] float32: in front of H.T, and behind it
    state_ptr,  # [rows, splits, 2, GROUP] float32: largest logit, sum of exp(logit - largest)
    scaling,
    softcap,
    heads,
    chunks,  # held
    taken,  # of them by a program
    coded,  # programs that take chunks
    sinks,  # tokens
    tails,
    key_room,  # chunks of a row
    value_room,
    first,  # number of the first chunk in ``starts``
    mask_batch,  # strides
    mask_head,
    mask_token,
    GROUP: tl.constexpr,  # queries of a head
    QUERIES: tl.constexpr,  # GROUP, filled up to what the matrix instruction takes
    W: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,  # DK and DV, filled up to powers of two
    BLOCK_V: tl.constexpr,
    KEY_GROUP: tl.constexpr,  # channels that share a range of the mean
    VALUE_GROUP: tl.constexpr,
    KEY_BITS: tl.constexpr,  # of the mean
    VALUE_BITS: tl.constexpr,
    ROTARY: tl.constexpr,  # channels that are rotated
    BLOCK_R: tl.constexpr,  # half of them, filled up
    INTERLEAVED: tl.constexpr,
    CODED: tl.constexpr,  # there are chunks
    CAPPED: tl.constexpr,
    ADDED: tl.constexpr,
    BY_HEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,  # tokens as they came, of a program
    DTYPE: tl.constexpr,  # that codewords are multiplied in
    PLAIN: tl.constexpr,  # that other tokens are multiplied in
    STAGES: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, k, v = tl.arange(0, QUERIES), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    there = n < GROUP
    # [.., QUERIES] of q and H q: from a channel to its place
    query, known = (row * GROUP + n)[None, :] * DK, there[None, :]
    highest = tl.full([QUERIES], -3.4028234663852886e38, tl.float32)
    total = tl.full([QUERIES], 0.0, tl.float32)
    front = tl.full([BLOCK_V, QUERIES], 0.0, tl.float32)
    behind = tl.full([BLOCK_V, QUERIES], 0.0, tl.float32)
    if mask_ptr is not None:
        mask_ptr += row // heads * mask_batch + row % heads * GROUP * mask_head
    of_query = tl.where(there, n, 0) * mask_head

    if split >= coded:
        token = (split - coded) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_sink, in_tail = token < sinks, (token >= sinks) & (token < sinks + tails)
        sink, tail = (row * sinks + token)[:, None], (row * tails + token - sinks)[:, None]
        queries = tl.load(q_ptr + query + k[:, None], mask=known & (k < DK)[:, None], other=0.0).to(PLAIN)
        inside = (k < DK)[None, :]
        keys = tl.load(key_sink_ptr + sink * DK + k[None, :], mask=in_sink[:, None] & inside, other=0.0).to(PLAIN)
        newer = tl.load(key_tail_ptr + tail * DK + k[None, :], mask=in_tail[:, None] & inside, other=0.0).to(PLAIN)
        keys = tl.where(in_sink[:, None], keys, newer)
        logits = tl.dot(keys, queries, input_precision="ieee") * scaling
        some = in_sink | in_tail
        place = tl.where(in_tail, token + chunks * W, tl.where(in_sink, token, 0)) * mask_token
        logits = _seen(logits, mask_ptr, place, of_query, softcap, CAPPED, ADDED, BY_HEAD)
        logits = tl.where(some[:, None], logits, float("-inf"))
        highest = tl.maximum(highest, tl.max(logits, axis=0))
        weights = tl.exp(logits - highest[None, :])
        total = tl.sum(weights, axis=0)
        inside = (v < DV)[None, :]
        values = tl.load(value_sink_ptr + sink * DV + v[None, :], mask=in_sink[:, None] & inside, other=0.0).to(PLAIN)
        newer = tl.load(value_tail_ptr + tail * DV + v[None, :], mask=in_tail[:, None] & inside, other=0.0).to(PLAIN)
        values = tl.where(in_sink[:, None], values, newer)
        behind = tl.dot(tl.trans(values), weights.to(PLAIN), input_precision="ieee")

    if CODED:
        slot = tl.arange(0, W)
        if split < coded:
            turned = tl.load(turned_ptr + query + k[:, None], mask=known & (k < DK)[:, None], other=0.0) * scaling
            size = _row_maximum(turned)
            turned = (turned / size[None, :]).to(DTYPE)
            if ROTARY > 0:
                j = tl.arange(0, BLOCK_R)
                pair = j < ROTARY // 2
                one = 2 * j if INTERLEAVED else j
                other = one + 1 if INTERLEAVED else j + ROTARY // 2
                whole = known & pair[:, None]
                q_one = tl.load(q_ptr + query + one[:, None], mask=whole, other=0.0).to(tl.float32) * scaling
                q_other = tl.load(q_ptr + query + other[:, None], mask=whole, other=0.0).to(tl.float32) * scaling
                q_size = tl.maximum(_row_maximum(q_one), _row_maximum(q_other))
                q_one, q_other = q_one / q_size[None, :], q_other / q_size[None, :]
                wave = slot[:, None] * (ROTARY // 2) + j[None, :]
                cosines = tl.load(waves_ptr + wave, mask=pair[None, :], other=0.0).to(DTYPE)
                sines = tl.load(waves_ptr + W * (ROTARY // 2) + wave, mask=pair[None, :], other=0.0).to(DTYPE)
            if key_mean_codes_ptr is not None and ROTARY < DK:
                rest = (k >= ROTARY) & (k < DK)
                q_rest = tl.load(q_ptr + query + k[:, None], mask=known & rest[:, None], other=0.0).to(tl.float32)
                q_rest *= scaling
            totals = tl.full([W, QUERIES], 0.0, tl.float32)
            begin = split * taken
            for number in tl.range(begin, tl.minimum(begin + taken, chunks), num_stages=STAGES):
                at = row * key_room + number
                words = _codewords(key_codes_ptr, key_signs_ptr, key_book_ptr, flips_ptr, at, DK, BLOCK_K, W, DTYPE)
                gain = tl.load(key_gain_ptr + at * W + slot).to(tl.float32)
                logits = tl.dot(words, turned, input_precision="ieee") * size[None, :] * gain[:, None]
                if ROTARY > 0:
                    bound = _mean_bound(key_mean_range_ptr, at, DK // KEY_GROUP, BLOCK_K // KEY_GROUP, KEY_BITS)
                    place = starts_ptr + (first + number) * ROTARY + j
                    shrunk = 1.0 / bound
                    cos = tl.load(place, mask=pair, other=0.0) * shrunk
                    sin = tl.load(place + ROTARY // 2, mask=pair, other=0.0) * shrunk
                    m_one = _mean(key_mean_codes_ptr, key_mean_range_ptr, at, one, pair, DK, KEY_GROUP, KEY_BITS)
                    m_other = _mean(key_mean_codes_ptr, key_mean_range_ptr, at, other, pair, DK, KEY_GROUP, KEY_BITS)
                    u_one, u_other = (m_one * cos - m_other * sin)[:, None], (m_other * cos + m_one * sin)[:, None]
                    even, odd = q_one * u_one + q_other * u_other, q_other * u_one - q_one * u_other
                    means = tl.dot(cosines, even.to(DTYPE), input_precision="ieee")
                    means = tl.dot(sines, odd.to(DTYPE), means, input_precision="ieee")
                    logits += means * (q_size * bound)[None, :]
                if key_mean_codes_ptr is not None and ROTARY < DK:
                    mean = _mean(key_mean_codes_ptr, key_mean_range_ptr, at, k, rest, DK, KEY_GROUP, KEY_BITS)
                    logits += tl.sum(q_rest * mean[:, None], axis=0)[None, :]
                norms, _ = _norms(key_norm_codes_ptr, key_norm_range_ptr, at, W)
                logits *= norms[:, None]
                place = (sinks + number * W + slot) * mask_token
                logits = _seen(logits, mask_ptr, place, of_query, softcap, CAPPED, ADDED, BY_HEAD)

                new = tl.maximum(highest, tl.max(logits, axis=0))
                faded, weights = tl.exp(highest - new), tl.exp(logits - new[None, :])
                highest, totals = new, totals * faded[None, :] + weights
                at = row * value_room + number
                norms, bound = _norms(value_norm_codes_ptr, value_norm_range_ptr, at, W)
                weights *= (norms * (1.0 / bound))[:, None]
                if value_mean_codes_ptr is not None:
                    mean = _mean(value_mean_codes_ptr, value_mean_range_ptr, at, v, v < DV, DV, VALUE_GROUP, VALUE_BITS)
                    behind = behind * faded[None, :] + (mean * bound)[:, None] * tl.sum(weights, axis=0)[None, :]
                weights *= tl.load(value_gain_ptr + at * W + slot).to(tl.float32)[:, None]
                words = _codewords(
                    value_codes_ptr, value_signs_ptr, value_book_ptr, flips_ptr, at, DV, BLOCK_V, W, DTYPE
                )
                added = tl.dot(tl.trans(words), weights.to(DTYPE), input_precision="ieee")
                front = front * faded[None, :] + added * bound
            total = tl.sum(totals, axis=0)

    at = row * tl.num_programs(1) + split
    state = state_ptr + at * (2 * GROUP) + n
    tl.store(state, highest, mask=there)
    tl.store(state + GROUP, total, mask=there)
    sums = sums_ptr + at * (2 * GROUP * DV) + n[None, :] * DV + v[:, None]
    inside = there[None, :] & (v < DV)[:, None]
    if CODED:
        tl.store(sums, front, mask=inside)
    tl.store(sums + GROUP * DV, behind, mask=inside)


@jit(do_not_specialize=["splits", "coded"])
def merge_kernel(
    sums_ptr,  # as of ``split_kernel``
    state_ptr,
    hadamard_ptr,  # H, float32 [DV, DV]
    out_ptr,  # [rows * GROUP, DV]
    splits,
    coded,  # of them
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a program
    SPLITS: tl.constexpr,  # in hand at once
    CODED: tl.constexpr,
):
    """Sums of a query from all programs that had a part of its tokens, as with one softmax; H.T in the end.

    A query that sees nothing gets 0."""
    query = tl.program_id(0).to(tl.int64)
    first = query // GROUP * splits
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    v, s = tl.arange(0, BLOCK_V), tl.arange(0, SPLITS)
    state_ptr += query % GROUP
    sums_ptr += query % GROUP * DV
    highest = -3.4028234663852886e38
    for start in range(0, splits, SPLITS):
        part = tl.load(
            state_ptr + (first + start + s) * (2 * GROUP), mask=start + s < splits, other=-3.4028234663852886e38
        )
        highest = tl.maximum(highest, tl.max(part, axis=0))
    total = 0.0
    front = tl.full([BLOCK_V], 0.0, tl.float32)
    behind = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(0, splits, SPLITS):
        inside = start + s < splits
        state = state_ptr + (first + start + s) * (2 * GROUP)
        weight = tl.exp(tl.load(state, mask=inside, other=-3.4028234663852886e38) - highest)
        total += tl.sum(weight * tl.load(state + GROUP, mask=inside, other=0.0), axis=0)
        sums = sums_ptr + (first + start + s)[:, None] * (2 * GROUP * DV)
        if CODED:
            there = (start + s < coded)[:, None] & (v < DV)[None, :]
            front += tl.sum(weight[:, None] * tl.load(sums + v[None, :], mask=there, other=0.0), axis=0)
        there = inside[:, None] & (column < DV)[None, :]
        part = tl.load(sums + GROUP * DV + column[None, :], mask=there, other=0.0)
        behind += tl.sum(weight[:, None] * part, axis=0)
    if CODED:
        there = (v < DV)[:, None] & (column < DV)[None, :]
        hadamard = tl.load(hadamard_ptr + v[:, None] * DV + column[None, :], mask=there, other=0.0)
        behind += tl.sum(front[:, None] * hadamard, axis=0)
    tl.store(out_ptr + query * DV + column, behind / tl.maximum(total, 1.1754943508222875e-38), mask=column < DV)
