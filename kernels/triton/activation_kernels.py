"""The Triton functions that turn activations into codes: ``activation.py`` launches them.

    x' = x * scale + shift                        per channel, rounded to the dtype of x after each step
    step = max |x'| / ((2**b - 1) / 2)            symmetric; asymmetric: (high - low) / (2**b - 1), low <= 0 <= high
    code = round(clamp(x' / step + zero_point))

All arithmetic is that of ``reference.grid_over`` and ``input_codes.quantize``: each step in float32, its result rounded
to the dtype of x, where that has 16 bits, as PyTorch does it. Codes, steps and zero points are theirs bit for bit.
Nothing may be contracted to fused multiplications and additions: launch with ``enable_fp_fusion=False``.

INTERPRETED: Triton's interpreter cuts a float32 off where a GPU rounds it to bfloat16, and cannot compute in bfloat16.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.language import jit, tl


@jit
def rounded(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``value``, float32, rounded to DTYPE and float32 again."""
    if tl.float32 == DTYPE:
        result = value
    elif INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        result = tl.where(value == value, even, value)
    else:
        result = value.to(DTYPE).to(tl.float32)
    return result


@jit
def changed(x, column, inside, scale_ptr, shift_ptr, signs_ptr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x * scale + shift, then times signs, of the ``x`` (float32) at ``column``; 0 stays where it is not ``inside``."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x * scale, DTYPE, INTERPRETED)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x + shift, DTYPE, INTERPRETED)
    if signs_ptr is not None:
        x = x * tl.load(signs_ptr + column, mask=inside, other=0).to(tl.float32)
    return x


@jit
def _flat_max(value):
    """The largest number of a tile of one or two dimensions."""
    if len(value.shape) == 2:
        value = tl.max(value, axis=1)
    return tl.max(value, axis=0)


@jit
def extent(x, SPREAD: tl.constexpr):
    """(low, high, peak) of a tile of float32 in which 0 fills what is outside: its least and its largest value, not
    above and not below 0, with SPREAD; and the bits of its largest magnitude, where infinity and then NaN come last."""
    peak = _flat_max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    low, high = 0.0, 0.0
    if SPREAD:
        low = tl.minimum(-_flat_max(-x), 0.0)
        high = tl.maximum(_flat_max(x), 0.0)
    return low, high, peak


@jit
def grid(
    low,
    high,
    peak,
    clip_ptr,  # [2] or None
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RECIPROCAL: tl.constexpr,  # PyTorch divides by a number on a CPU, and on a GPU multiplies by one over it
    EPS: tl.constexpr,  # the step where nothing differs from 0
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(step, zero point) of the grid over ``extent``; the step is NaN if that is not finite."""
    STEPS: tl.constexpr = 2**BITS - 1
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    if clip_ptr is not None:
        low = rounded(low * tl.load(clip_ptr).to(tl.float32), DTYPE, INTERPRETED)
        high = rounded(high * tl.load(clip_ptr + 1).to(tl.float32), DTYPE, INTERPRETED)
    if not SYMMETRIC:
        width = rounded(high - low, DTYPE, INTERPRETED)
        parts = STEPS * 1.0
    elif clip_ptr is not None:
        width = tl.maximum(-low, high)
        parts = STEPS / 2
    else:
        width = peak.to(tl.float32, bitcast=True)
        parts = STEPS / 2
    step = width * (1.0 / parts) if RECIPROCAL else tl.div_rn(width, parts)
    step = rounded(step, DTYPE, INTERPRETED)
    step = tl.where(step == 0.0, EPS, step)
    zero = 0.0
    if not SYMMETRIC:
        zero = LOWEST - rounded(tl.div_rn(low, step), DTYPE, INTERPRETED)
        zero = tl.minimum(tl.maximum(rounded(zero, DTYPE, INTERPRETED), LOWEST), LOWEST + STEPS)
        zero = (zero + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left has no fraction, halves went to even
    return tl.where(peak < 0x7F800000, step + (step - step), float("nan")), zero


@jit
def codes_of(
    x, step, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """(codes int32, of which the low byte counts; what they are the nearest integers of, NaN where there is none)."""
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    if tl.float32 == DTYPE:
        value = tl.div_rn(x, step)
    else:
        # The same number for a fraction of the time. A quotient of two numbers of 8 (11) bits is no middle between two
        # others of as many, nor closer to one than 2**-17 (2**-22.9994) of itself; this is off by less than 2**-23.
        lift = tl.where(step < 2.0**-100, 2.0**64, 1.0)  # one over the least bfloat16 would be infinite
        value = rounded((x * lift) * tl.div_rn(1.0, step * lift), DTYPE, INTERPRETED)
    if not SYMMETRIC:
        value = rounded(value + zero, DTYPE, INTERPRETED)
    inside = tl.minimum(tl.maximum(value, LOWEST), -LOWEST - 1)
    # 1.5 * 2**23 + code: rounded half to even, and the code is in the low bits, negative ones as their complement.
    return (inside + 12582912.0).to(tl.int32, bitcast=True), value


@jit
def store_codes(codes_ptr, place, inside, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr):
    """Write ``codes`` [ROWS, COLUMNS] as bytes to ``place``; PACKED: two to a byte, the even column in its low half."""
    if PACKED:
        even, odd = tl.split(tl.reshape(codes, [ROWS, COLUMNS // 2, 2]))
        codes = (even & 0xF) | ((odd & 0xF) << 4)
    tl.store(codes_ptr + place, codes.to(tl.int8), mask=inside)


@jit
def given_grid(given_scale_ptr, given_zero_ptr):
    """(step, zero point) of a grid that is the same for all of x."""
    step = tl.load(given_scale_ptr).to(tl.float32)
    zero = 0.0
    if given_zero_ptr is not None:
        zero = tl.load(given_zero_ptr).to(tl.float32)
    return step, zero


@jit
def store_grid(scale_ptr, zero_ptr, row, step, zero, broken):
    """Write what the codes of ``row`` mean; its step is NaN if it is ``broken``."""
    step = tl.where(broken != 0, float("nan"), step + (step - step))
    tl.store(scale_ptr + row, step)
    if zero_ptr is not None:
        tl.store(zero_ptr + row, tl.cast(zero, tl.float32))


@jit
def extent_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    signs_ptr,
    low_ptr,  # [rows] float32
    high_ptr,  # [rows] float32
    columns,
    stride_x,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The range of every row, which 0 is always in; both ends are NaN for a row that holds one."""
    row = tl.program_id(0).to(tl.int64)
    low, high, peak = 0.0, 0.0, 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        x = changed(x, column, inside, scale_ptr, shift_ptr, signs_ptr, DTYPE, INTERPRETED)
        part_low, part_high, part_peak = extent(x, True)
        low, high, peak = tl.minimum(low, part_low), tl.maximum(high, part_high), tl.maximum(peak, part_peak)
    tl.store(low_ptr + row, tl.where(peak > 0x7F800000, float("nan"), low))
    tl.store(high_ptr + row, tl.where(peak > 0x7F800000, float("nan"), high))


@jit
def gated(gate, x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """activation(gate) * x of two tiles of float32; silu: z = gate, gelu: z = sqrt(8 / pi) (gate + 0.044715 gate**3).

    activation(gate) = gate / (1 + exp(-z)), for gelu the approximation with tanh, since 1 + tanh(z / 2) is
    2 / (1 + exp(-z)). That and the product are rounded to DTYPE, as PyTorch does it.
    """
    z = gate
    if ACTIVATION == "gelu":
        z = 1.5957691216057308 * (gate + 0.044715 * (gate * gate * gate))
    return rounded(rounded(gate / (1.0 + tl.exp(-z)), DTYPE, INTERPRETED) * x, DTYPE, INTERPRETED)


@jit
def loaded(
    x_row,
    gate_row,
    column,
    inside,
    ACTIVATION: tl.constexpr,
    EVICTED: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x at ``column`` as float32, 0 where it is not ``inside``; with ``gate_row`` it is activation(gate) * x."""
    x = tl.load(x_row + column, mask=inside, other=0.0, eviction_policy=EVICTED).to(tl.float32)
    if gate_row is not None:
        gate = tl.load(gate_row + column, mask=inside, other=0.0, eviction_policy=EVICTED).to(tl.float32)
        x = gated(gate, x, ACTIVATION, DTYPE, INTERPRETED)
    return x


@jit
def write_row(
    x,  # [BLOCK] float32; 0 beyond columns
    scale_ptr,
    shift_ptr,
    signs_ptr,
    clip_ptr,
    given_scale_ptr,
    given_zero_ptr,
    codes_row,
    row_scale_ptr,
    row_zero_ptr,
    row,
    columns,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr,
    PACKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Change, round and write a row that is in hand as a whole; arguments as in ``quantize_kernel``."""
    SHARE: tl.constexpr = 2 if PACKED else 1
    column, unit = tl.arange(0, BLOCK), tl.arange(0, BLOCK // SHARE)
    inside = column < columns
    broken = 0
    x = changed(x, column, inside, scale_ptr, shift_ptr, signs_ptr, DTYPE, INTERPRETED)
    if OWN:
        low, high, peak = extent(x, (not SYMMETRIC) or clip_ptr is not None)
        step, zero = grid(low, high, peak, clip_ptr, BITS, SYMMETRIC, RECIPROCAL, EPS, DTYPE, INTERPRETED)
    else:
        step, zero = given_grid(given_scale_ptr, given_zero_ptr)
    codes, value = codes_of(x, step, zero, BITS, SYMMETRIC, DTYPE, INTERPRETED)
    if not OWN:
        broken = tl.max(((value != value) & inside).to(tl.int32), axis=0)
    store_codes(codes_row, unit[None, :], (unit < columns // SHARE)[None, :], codes[None, :], 1, BLOCK, PACKED)
    store_grid(row_scale_ptr, row_zero_ptr, row, step, zero, broken)


@jit
def quantize_row(
    x_row,
    gate_row,  # or None
    scale_ptr,
    shift_ptr,
    signs_ptr,
    clip_ptr,
    given_scale_ptr,
    given_zero_ptr,
    codes_row,
    row_scale_ptr,
    row_zero_ptr,
    row,
    columns,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr,
    PACKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Read, change, round and write a row; arguments as in ``quantize_kernel`` and ``loaded``."""
    SPREAD: tl.constexpr = (not SYMMETRIC) or clip_ptr is not None
    SHARE: tl.constexpr = 2 if PACKED else 1  # codes of a byte
    column, unit = tl.arange(0, BLOCK), tl.arange(0, BLOCK // SHARE)
    if WHOLE:
        x = loaded(x_row, gate_row, column, column < columns, ACTIVATION, "", DTYPE, INTERPRETED)
        write_row(
            x, scale_ptr, shift_ptr, signs_ptr, clip_ptr, given_scale_ptr, given_zero_ptr, codes_row, row_scale_ptr,
            row_zero_ptr, row, columns, BITS, SYMMETRIC, OWN, PACKED, RECIPROCAL, EPS, DTYPE, INTERPRETED, BLOCK,
        )  # fmt: skip
    else:
        broken = 0
        if OWN:
            low, high, peak = 0.0, 0.0, 0
            for start in range(0, columns, BLOCK):
                inside = start + column < columns
                x = loaded(x_row, gate_row, start + column, inside, ACTIVATION, "evict_last", DTYPE, INTERPRETED)
                x = changed(x, start + column, inside, scale_ptr, shift_ptr, signs_ptr, DTYPE, INTERPRETED)
                part_low, part_high, part_peak = extent(x, SPREAD)
                peak = tl.maximum(peak, part_peak)
                if SPREAD:
                    low, high = tl.minimum(low, part_low), tl.maximum(high, part_high)
            step, zero = grid(low, high, peak, clip_ptr, BITS, SYMMETRIC, RECIPROCAL, EPS, DTYPE, INTERPRETED)
        else:
            step, zero = given_grid(given_scale_ptr, given_zero_ptr)
        for start in range(0, columns, BLOCK):
            inside = start + column < columns
            x = loaded(x_row, gate_row, start + column, inside, ACTIVATION, "evict_first", DTYPE, INTERPRETED)
            x = changed(x, start + column, inside, scale_ptr, shift_ptr, signs_ptr, DTYPE, INTERPRETED)
            codes, value = codes_of(x, step, zero, BITS, SYMMETRIC, DTYPE, INTERPRETED)
            if not OWN:
                broken = tl.maximum(broken, tl.max(((value != value) & inside).to(tl.int32), axis=0))
            place = start // SHARE + unit[None, :]
            store_codes(codes_row, place, place < columns // SHARE, codes[None, :], 1, BLOCK, PACKED)
        store_grid(row_scale_ptr, row_zero_ptr, row, step, zero, broken)


@jit
def quantize_kernel(
    x_ptr,  # [rows, columns] of DTYPE, rows of stride_x, columns next to each other
    scale_ptr,  # [columns] or None
    shift_ptr,  # [columns] or None
    signs_ptr,  # [columns] int8 or None
    clip_ptr,  # [2] or None
    given_scale_ptr,  # [1]; without OWN
    given_zero_ptr,  # [1]; without OWN, asymmetric
    codes_ptr,  # [rows, columns] int8; PACKED: [rows, columns / 2]
    row_scale_ptr,  # [rows] float32
    row_zero_ptr,  # [rows] float32; asymmetric
    columns,
    stride_x,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr,  # every row has a grid over its own range
    PACKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row fits into BLOCK: it stays in registers between its range and its codes
):
    row = tl.program_id(0).to(tl.int64)
    quantize_row(
        x_ptr + row * stride_x, None, scale_ptr, shift_ptr, signs_ptr, clip_ptr, given_scale_ptr, given_zero_ptr,
        codes_ptr + row * (columns // (2 if PACKED else 1)), row_scale_ptr, row_zero_ptr, row, columns, "none", BITS,
        SYMMETRIC, OWN, PACKED, RECIPROCAL, EPS, DTYPE, INTERPRETED, BLOCK, WHOLE,
    )  # fmt: skip
