"""5- to 8-bit codes with one scale per output row on x86, through ``aten::_weight_int8pack_mm``, bfloat16 only: in
other dtypes it is slower than a dense product.

The operator computes x @ W.T, W[n, k] = value[n, k] * scale[n], in float32 and rounds once; in bfloat16 it reads past
the end of rows that are no multiple of 16 long, so columns are filled up with zeros. Any width that fits into int8
without its zero point (up to 7 bits, or 8 symmetric) can be run. Narrower ones are left to ``int4``.

From ``FEW_ROWS`` rows of x up, turning the codes into bfloat16, which is exact, and a dense product that is scaled
afterwards is faster than the operator, whose time grows with each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.cpu import values
from quantkit.kernels.lacking import Lacking
from quantkit.kernels.library import define
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

FEW_ROWS = 20
"""Rows of x up to which the operator is faster than unpacking; ``quantkit bench kernels`` shows where they cross."""

_COLUMNS = 16
"""Columns are filled up to a multiple of this."""
_UNPACKED_ROWS = 256
"""Rows of the weight that are unpacked at once: few enough to be in the cache still when they are multiplied."""


def refuses(layer: QuantLinear, device: torch.device) -> str | None:
    weights = layer.format.weights
    if device.type != "cpu":
        return f"for CPUs, not {device.type}"
    if layer.format.activations is not None:
        return "activations are rounded"
    if weights.bits <= 4:
        return f"for 5 to 8 bits, not {weights.bits}"
    if not values.fit_int8(layer):
        return "8-bit codes with zero points do not fit into int8"
    if weights.group_size != PER_CHANNEL:
        return f"for one scale per row, not groups of {weights.group_size}"
    if layer.weight_scale.dtype != torch.bfloat16:
        return f"for bfloat16 models, not {str(layer.weight_scale.dtype).removeprefix('torch.')}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return Lacking("torch's 8-bit operator has no vector code for this processor")
    return None


def pack(layer: QuantLinear) -> Tensor | None:
    """[out_features, in_features, filled up] int8."""
    if not values.has_clean_padding(layer):
        return None
    return values.padded(layer, _COLUMNS)


def restore(packed: Tensor, layer: QuantLinear) -> Tensor:
    return values.restore(layer, packed)


def few_rows(x: Tensor, layer: QuantLinear, packed: Tensor) -> Tensor:
    y: Tensor = _few_rows_op(layer.changed_input(x), packed, layer.weight_scale, layer.bias)
    return y


def many_rows(x: Tensor, layer: QuantLinear, packed: Tensor) -> Tensor:
    y: Tensor = _many_rows_op(layer.changed_input(x), packed, layer.weight_scale, layer.bias)
    return y


def _few_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    flat = F.pad(flat, (0, weight.shape[1] - flat.shape[1])).contiguous()
    y: Tensor = torch.ops.aten._weight_int8pack_mm(flat, weight, scale.view(-1))
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


def _many_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    columns = flat.shape[1]
    y = flat.new_empty(len(flat), len(weight))
    dense = flat.new_empty(min(_UNPACKED_ROWS, len(weight)), columns)
    for first in range(0, len(weight), _UNPACKED_ROWS):
        part = weight[first : first + _UNPACKED_ROWS, :columns]
        y[:, first : first + len(part)] = F.linear(flat, dense[: len(part)].copy_(part))
    y *= scale.view(-1)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_few_rows_op = define(
    "int8_weight_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _few_rows, _fake
)
_many_rows_op = define(
    "int8_weight_unpacked_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _many_rows, _fake
)
