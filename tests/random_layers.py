"""Quantised linears with random codes, and what they compute in float64: for tests of kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from handmade import layer_format
from torch import Tensor

from quantkit.formats.layer import signed_from_codes
from quantkit.formats.packing import pack_rows, pack_zero_points
from quantkit.layers.quant_linear import QuantLinear


def random_layer(scheme: str, rows: int, columns: int, bias: bool, dtype: torch.dtype, **settings: Any) -> QuantLinear:
    """``scheme`` [rows, columns] with codes and zero points of all values; scales, half numbers, differ by up to 8, so
    that one of another group or row shows."""
    layer = QuantLinear(columns, rows, bias, layer_format(scheme, **settings), dtype)
    layer.weight_scale.copy_(torch.rand(layer.weight_scale.shape).mul(3).exp2().div(100).half())
    weights = layer.format.weights
    codes = torch.randint(2**weights.bits, (rows, columns), dtype=torch.uint8)
    if layer.format.storage == "int8":
        layer.weight.copy_(signed_from_codes(codes))
    else:
        layer.weight_packed.copy_(pack_rows(codes, weights.bits))
        layer.weight_shape.copy_(torch.tensor([rows, columns]))
    if not weights.symmetric:
        zero_point = torch.randint(2**weights.bits, layer.weight_scale.shape, dtype=torch.uint8)
        layer.weight_zero_point.copy_(pack_zero_points(zero_point, weights.bits))
    if layer.format.input_scale:
        layer.input_scale_vector.uniform_(0.5, 2)
    if layer.bias is not None:
        layer.bias.normal_()
    return layer


def exact_product(x: Tensor, layer: QuantLinear) -> Tensor:
    """float64, with the weight in float64 from the stored codes and scales."""
    double = copy.deepcopy(layer).double()
    return F.linear(layer.changed_input(x).double(), double.dequantize(), double.bias)


def relative_error(y: Tensor, want: Tensor) -> float:
    """|y - want| / |want|, Frobenius."""
    return float((y.double() - want).norm() / want.norm())
