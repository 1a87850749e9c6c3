"""The Triton functions that make activations and their codes in one pass: ``fused.py`` launches them.

    llama    y = round(x / rms(x)) * weight                       rms(x) = sqrt(mean(x**2) + epsilon)
    gemma    y = x / rms(x) * (1 + weight)
    layer    y = (x - mean(x)) / rms(x - mean(x)) * weight + bias

each in float32 and rounded to the dtype of x at the end; llama also where it says so, and after the product. Codes are
those of y, bit for bit (``activation_kernels.py``); y itself is PyTorch's but for the order in which a row is summed.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from quantkit.kernels.triton.activation_kernels import quantize_row, rounded, write_row
from quantkit.kernels.triton.language import jit, tl


@jit
def normalised(
    x,  # [BLOCK] float32; 0 beyond columns
    column,
    inside,
    weight_ptr,
    bias_ptr,
    epsilon,
    share,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The norm KIND of a row, rounded to DTYPE; beyond columns 0, or NaN in a row that is NaN."""
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "layer":
        x = tl.where(inside, x - tl.sum(x, axis=0) * share, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) * share + epsilon)
    if KIND == "llama":
        y = rounded(y, DTYPE, INTERPRETED) * weight
    elif KIND == "gemma":
        y = y * (1.0 + weight)
    else:
        y = y * weight
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return rounded(y, DTYPE, INTERPRETED)


@jit
def norm_kernel(
    x_ptr,  # [rows, columns] of DTYPE, rows of stride_x, columns next to each other
    residual_ptr,  # the same, rows of stride_residual; or None
    weight_ptr,  # [columns]
    bias_ptr,  # [columns] or None
    scale_ptr,  # this and what follows as in quantize_kernel
    shift_ptr,
    clip_ptr,
    given_scale_ptr,
    given_zero_ptr,
    codes_ptr,
    row_scale_ptr,
    row_zero_ptr,
    sum_ptr,  # [rows, columns] of DTYPE: x + residual; where there is one
    values_ptr,  # [rows, columns] of DTYPE: what the codes stand for, unrounded; or None
    columns,
    stride_x,
    stride_residual,
    epsilon,
    share,  # one over columns
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OWN: tl.constexpr,
    PACKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,  # a row fits
):
    """The codes of the norm of x, or of x + residual, which is written, too."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x + residual, DTYPE, INTERPRETED)
        tl.store(sum_ptr + row * columns + column, x.to(DTYPE), mask=inside)
    y = normalised(x, column, inside, weight_ptr, bias_ptr, epsilon, share, KIND, DTYPE, INTERPRETED)
    if values_ptr is not None:
        tl.store(values_ptr + row * columns + column, y.to(DTYPE), mask=inside)
    write_row(
        y, scale_ptr, shift_ptr, None, clip_ptr, given_scale_ptr, given_zero_ptr,
        codes_ptr + row * (columns // (2 if PACKED else 1)), row_scale_ptr, row_zero_ptr, row, columns, BITS, SYMMETRIC,
        OWN, PACKED, RECIPROCAL, EPS, DTYPE, INTERPRETED, BLOCK,
    )  # fmt: skip


@jit
def gated_kernel(
    gate_ptr,  # [rows, columns] of DTYPE, rows of stride_gate, columns next to each other
    up_ptr,  # the same, rows of stride_up
    scale_ptr,  # this and what follows as in quantize_kernel
    shift_ptr,
    clip_ptr,
    given_scale_ptr,
    given_zero_ptr,
    codes_ptr,
    row_scale_ptr,
    row_zero_ptr,
    columns,
    stride_gate,
    stride_up,
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
    """The codes of activation(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    quantize_row(
        up_ptr + row * stride_up, gate_ptr + row * stride_gate, scale_ptr, shift_ptr, None, clip_ptr, given_scale_ptr,
        given_zero_ptr, codes_ptr + row * (columns // (2 if PACKED else 1)), row_scale_ptr, row_zero_ptr, row, columns,
        ACTIVATION, BITS, SYMMETRIC, OWN, PACKED, RECIPROCAL, EPS, DTYPE, INTERPRETED, BLOCK, WHOLE,
    )  # fmt: skip
