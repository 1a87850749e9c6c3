"""Rounded activations times rounded weights in integers on x86, through ``onednn::qlinear_pointwise``.

    y = scale_x * scale_w * (sum_k (q_x[k] - zero_x) * q_w[k]) + bias
      = scale_x * scale_w * (sum_k (q_x[k] + 128) * q_w[k]  -  (128 + zero_x) * sum_k q_w[k]) + bias

with one scale per row of x and of the weight. Widths below 8 bits are run as int8, one byte per weight. The operator
wants x as unsigned bytes, hence the 128 (with signed ones it ends in a loop without vector instructions), adds up in
int32 and returns the sum as float32:

- |q_w| <= 128 and q_x + 128 <= 255, so the sum cannot overflow up to 65 793 columns.
- Up to 2**24 the float32 is exact. Where 128 * |sum q_w| is at most half of that, as it is unless the codes of a row
  lean heavily to one side, a larger sum has a large result, too, and loses no more than any float32 product does.
  Other weights are run with a zero point of 128 given to the operator, which then takes 128 * sum q_w off in int32, at
  the price of adding up q_w at every call.

Only with VNNI instructions: older ones add pairs of products in 16 bits and cut them off there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantkit.kernels.cpu import values
from quantkit.kernels.lacking import Lacking
from quantkit.kernels.library import define
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

_MOST_COLUMNS = (2**31 - 1) // (255 * 128)
_LARGEST_OFFSET = 2**23


class Int8(NamedTuple):
    """A weight [out_features, in_features]."""

    weight: Tensor
    """int8 in oneDNN's own order: a tensor whose data only its operators read."""
    scale: Tensor
    """[out_features] float32."""
    sums: Tensor
    """[out_features] float32, exact: sum_k q_w[k]."""
    lopsided: bool
    """Does the operator have to take 128 * sums off?"""


def refuses(layer: QuantLinear, device: torch.device) -> str | None:
    weights, activations = layer.format.weights, layer.format.activations
    if device.type != "cpu":
        return f"for CPUs, not {device.type}"
    if activations is None:
        return "activations are not rounded"
    if activations.granularity == "group":
        return f"for one scale per token, not per {activations.group_size} channels"
    if weights.levels != "uniform":
        return f"{weights.levels} codes are not evenly spaced"
    if not values.fit_int8(layer):
        return "8-bit codes with zero points do not fit into int8"
    if weights.group_size != PER_CHANNEL:
        return f"for one scale per row, not groups of {weights.group_size}"
    if layer.weight_scale.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"for models of 16 or 32 bits, not {str(layer.weight_scale.dtype).removeprefix('torch.')}"
    if layer.in_features > _MOST_COLUMNS:
        return f"sums of {layer.in_features} products may overflow int32"
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return Lacking("torch's integer product has no vector code for this processor")
    return None


def pack(layer: QuantLinear) -> Int8 | None:
    if not values.has_clean_padding(layer):
        return None
    weight = values.padded(layer, 1)
    sums = weight.sum(dim=1, dtype=torch.int32).float()
    lopsided = bool(128 * sums.abs().max() > _LARGEST_OFFSET)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return Int8(packed, layer.weight_scale.view(-1).float(), sums, lopsided)


def restore(packed: Int8, layer: QuantLinear) -> Tensor:
    return values.restore(layer, packed.weight.to_dense().t())


def linear(x: Tensor, layer: QuantLinear, packed: Int8) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], layer.out_features)
    codes, scale, zero_point = layer.input_codes(x)
    y: Tensor = _op(codes, scale, zero_point, *packed, layer.bias, x.dtype)
    return y.view(*x.shape[:-1], layer.out_features)


def _linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, sums: Tensor,
    lopsided: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    unsigned = codes.contiguous().view(torch.uint8) ^ 0x80
    ones, zeros = torch.ones_like(sums), torch.zeros(len(sums), dtype=torch.int64)
    offset = 128 if lopsided else 0
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, offset, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    if zero_point is not None:
        y.addcmul_(zero_point + (128 - offset), sums, value=-1)
    elif not lopsided:
        y.sub_(128 * sums)
    y.mul_(weight_scale).mul_(scale)
    if bias is not None:
        y += bias
    return y.to(dtype)


def _fake(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, sums: Tensor,
    lopsided: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(codes.shape[0], sums.shape[0], dtype=dtype)


# A tensor in oneDNN's order has a dispatch key of its own.
_op = define(
    "int8_linear(Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, Tensor sums,"
    " bool lopsided, Tensor? bias, ScalarType dtype) -> Tensor",
    _linear,
    _fake,
    keys=("CPU", "MkldnnCPU"),
)
