"""Codes as signed integers, code - zero point, and back to the tensors they came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.formats.packing import pack_rows, unpack_rows, unpack_zero_points
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

_CHUNK = 2**22
"""Weights unpacked at once while packing: what is needed beside the two layouts stays a few tens of MB."""


def row_chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of rows of about ``_CHUNK`` weights; all but the last a multiple of ``multiple``."""
    step = max(1, _CHUNK // (columns * multiple)) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def fit_int8(layer: QuantLinear) -> bool:
    """Is every code - zero point within -128 .. 127? 8-bit codes with zero points span 9 bits."""
    return layer.format.weights.bits < 8 or bool(layer.format.weights.symmetric)


def has_clean_padding(layer: QuantLinear) -> bool:
    """Are the bits behind the last code of each row 0, as ``pack_rows`` leaves them?"""
    used = layer.in_features * layer.format.weights.bits % 32
    return layer.format.storage == "int8" or not used or not bool((layer.weight_packed[:, -1] & -(1 << used)).any())


def zero_points(layer: QuantLinear) -> Tensor | int:
    """[out_features, groups] uint8 in 0 .. 2**bits - 1, or the one number of a symmetric format."""
    weights = layer.format.weights
    if weights.symmetric:
        return 1 << (weights.bits - 1)
    return unpack_zero_points(layer.weight_zero_point, weights.bits, layer.out_features)


def read(layer: QuantLinear, zero_point: Tensor | int, first: int, last: int) -> Tensor:
    """[last - first, in_features] int8 of the stored rows: codes - ``zero_point``; needs ``fit_int8``."""
    if layer.format.storage == "int8":
        return layer.weight[first:last].clone()
    codes = unpack_rows(layer.weight_packed[first:last], layer.format.weights.bits, layer.in_features)
    return codes.sub_(_spread(zero_point, layer, first, last)).view(torch.int8)  # wraps modulo 256


def write(values: Tensor, layer: QuantLinear, zero_point: Tensor | int, first: int, last: int) -> Tensor:
    """The rows of ``weight_packed`` that ``read`` returned."""
    codes = values.view(torch.uint8) + _spread(zero_point, layer, first, last)
    return pack_rows(codes, layer.format.weights.bits)


def _spread(zero_point: Tensor | int, layer: QuantLinear, first: int, last: int) -> Tensor | int:
    """``zero_point`` of some rows, so that it can be added to [last - first, in_features] uint8."""
    if isinstance(zero_point, int):
        return zero_point
    rows, width = zero_point[first:last], layer.format.weights.group_size
    return rows if width == PER_CHANNEL else rows.repeat_interleave(width, dim=1)[:, : layer.in_features]


def padded(layer: QuantLinear, multiple: int) -> Tensor:
    """[out_features, columns] int8, codes - zero points, columns filled up to a multiple with zeros; needs
    ``fit_int8``. The stored tensor itself where it is that already."""
    columns = -(-layer.in_features // multiple) * multiple
    if layer.format.storage == "int8" and columns == layer.in_features:
        return layer.weight
    zero_point = zero_points(layer)
    filled = torch.zeros(layer.out_features, columns, dtype=torch.int8)
    for first, last in row_chunks(layer.out_features, layer.in_features):
        filled[first:last, : layer.in_features] = read(layer, zero_point, first, last)
    return filled


def restore(layer: QuantLinear, filled: Tensor) -> Tensor:
    """The stored weight that ``padded`` was made of, all of it."""
    signed = filled[:, : layer.in_features]
    if layer.format.storage == "int8":
        return signed.contiguous()
    zero_point, chunks = zero_points(layer), row_chunks(layer.out_features, layer.in_features)
    return torch.cat([write(signed[first:last].contiguous(), layer, zero_point, first, last) for first, last in chunks])
