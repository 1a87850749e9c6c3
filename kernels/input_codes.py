"""Activations as integers: the codes of which ``reference.fake_quantize`` returns the values.

    fake_quantize(x) = (codes - zero_point) * scale, rounded to the dtype of x

Scales and codes are found with the same arithmetic in the same dtype, so codes are those of the reference; their
product with the weight is exact, where the reference's is of values rounded once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.reference import grid_over
from quantkit.recipe import ActivationScheme


class InputCodes(NamedTuple):
    """Codes of x [rows, columns] of up to 8 bits."""

    codes: Tensor
    """[rows, columns] int8, signed."""
    scale: Tensor
    """[rows, 1] float32; NaN where the reference's row is NaN."""
    zero_point: Tensor | None
    """[rows, 1] float32, the signed code of 0; None: symmetric."""


def quantize(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    """Codes of ``x`` [..., columns], not empty, per token or per tensor.

    Args:
        inputs: of which the static range and the clip matter here.
    """
    x = x.reshape(-1, x.shape[-1])
    if inputs.static_scale is not None:
        scale = inputs.static_scale.to(x.dtype)
        zero_point = None if inputs.static_zero_point is None else inputs.static_zero_point.to(x.dtype)
    else:
        scale, zero_point = grid_over(*_range(x, scheme, inputs.clip), scheme, x.dtype)
    codes = x / scale
    if zero_point is not None:
        codes += zero_point
    half = 2 ** (scheme.bits - 1)
    codes.clamp_(-half, half - 1).round_()
    wide = scale.float().expand(len(x), 1)
    if inputs.static_scale is not None:  # an infinite x is cut off like any large one; NaN has no code
        wide = torch.where(codes.isnan().any(dim=-1, keepdim=True), torch.nan, wide)
    else:
        wide = wide + (wide - wide)  # the range of what is not finite: infinity, too, becomes NaN
    zero = None if zero_point is None else zero_point.float().expand(len(x), 1)
    return InputCodes(codes.to(torch.int8), wide, zero)


def _range(x: Tensor, scheme: ActivationScheme, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and largest value of each grid, [rows, 1] or []; or a range about 0 with the same symmetric grid."""
    if scheme.granularity == "tensor":
        low, high = torch.aminmax(x)
    elif scheme.symmetric and clip is None:
        high = x.abs().amax(dim=-1, keepdim=True)
        low = -high
    else:  # amin and amax one after the other take a fraction of aminmax's time
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if clip is not None:
        shares = clip.to(x.dtype)
        low, high = low * shares[0], high * shares[1]
    return low, high
