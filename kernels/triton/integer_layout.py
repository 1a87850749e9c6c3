"""The weight as the integer kernels read it, made once at load out of the stored form, and back.

    y = scale_x * sum_g scale_w[g] * sum_{k in g} (q_x[k] - zero_x) * (q_w[k] - zero_w[g])

A block of input columns is one tile [rows, plane] of bytes, and a byte holds ``fields`` codes that lie a plane apart:

    tiles[block, row, i] = sum_j  code[row, fields * plane * block + plane * j + i] << (width * j)    fields = 8 / width

so that field j of a tile, once each byte is masked, is an int8 operand of ``plane`` neighbouring columns and meets
``plane`` neighbouring input codes without any shuffling. (In the 16-bit words of ``layout.py`` neighbouring bytes hold
columns that lie 64 apart.)

    bits     width   what a field holds                         operand of the product
    2, 4     2, 4    the code                                   symmetric: (field - 2**(width - 1)) * 2**(8 - width);
                                                                else field - zero point
    3        4       the code; symmetric: twice the code        the same
    5 to 8   8       code - zero point, if that fits in int8    the byte
    8        8       code - 128, with a zero point              the byte; zero point - 128 is taken off the sums

The factor of a symmetric operand, 2**(8 - bits), is what is left of moving the code to the top of its byte, which takes
one instruction less than keeping it at the bottom; scales are divided by it.

3-bit codes take the room of 4: a third more bytes than they are stored in, for the 4-bit kernel as it is. A denser form
(two bits here, the third there, as in ``layout.py``) would cost every weight more instructions, of which these kernels
have few to spare; it has not been tried. Rows are padded to ROWS, columns to whole blocks: codes 0 with scale 0.
Where operands have a zero point, it shares a word with the scale:

    steps[group, row] = bits of the float32 scale | zero point        (see ``layout.py``)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.layer import signed_from_codes
from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.kernels.cpu import values
from quantkit.kernels.triton.layout import ROWS
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.formats.layer import LayerFormat
    from quantkit.layers.quant_linear import QuantLinear

WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Bits of a code -> bits of it in a byte."""
GROUP_UNIT = 32
"""Groups are multiples of this: the columns that one 8-bit matrix instruction adds up."""


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """One quantised matrix [out_features, in_features] in the layout above; all tensors are on one device."""

    tiles: Tensor
    """[blocks, rows, plane] int8."""
    steps: Tensor
    """[groups, rows] int32, scales and zero points."""
    sums: Tensor | None
    """What one step of an input's zero point takes off each row, [rows]; only where inputs have zero points.

    One scale per row: int32, exact, the sum of the row's operands. Groups: float32, sum_k (code - zero point) * scale,
    found in float64."""
    width: int
    zero_point: bool
    """Whether operands or their sums have a zero point in ``steps``."""
    group_size: int
    """Columns per row of ``steps``; PER_CHANNEL: one row in all."""
    out_features: int
    in_features: int


def plane_of(width: int, group_size: int) -> int:
    """Columns of a plane: as many as make 128 or 64 bytes of a tile's row, as long as they divide the groups."""
    widest = 128 if width == 8 else 64
    if group_size == PER_CHANNEL:
        return widest
    return next(plane for plane in (widest, 64, GROUP_UNIT) if group_size % plane == 0)


def block_columns(width: int, plane: int) -> int:
    """Input columns of one block."""
    return plane * (8 // width)


def supports(layer: LayerFormat) -> bool:
    """Whether the weight of ``layer`` can be laid out: evenly spaced codes, groups of a multiple of 32 columns."""
    weights = layer.weights
    whole = weights.group_size == PER_CHANNEL or weights.group_size % GROUP_UNIT == 0
    return whole and weights.levels == "uniform"


def most_columns(layer: LayerFormat) -> int | None:
    """The most columns whose products int32 holds whatever they are; None: any number.

    With x = q_x - zero_x and w = q_w - zero_w (times the factor of an operand)

        |x| <= 2**(bits - 1), with a zero point 2**bits - 1
        |w| <= 128: a signed byte; code - zero point: 15 at 4 bits, 255 at 8

    so |sum| <= columns * |x| * |w| < 2**31. 8-bit symmetric inputs and weights: 131 071 columns; both with zero points:
    33 025. Codes and operands themselves are never larger than that, so sums on the way fit, too (sm_80 cuts off what
    does not); what zero points take off may run over, since subtraction counts modulo 2**32. A group's sum is taken out
    after one block at the latest, at most 256 columns, so groups have no bound.
    """
    weights, activations = layer.weights, layer.activations
    assert activations is not None
    x = 2 ** (activations.bits - 1) if activations.symmetric else 2**activations.bits - 1
    w = 128 if weights.symmetric else 2**weights.bits - 1
    most = (2**31 - 1) // (x * w)
    return None if PER_CHANNEL < weights.group_size <= most else most


def from_layer(layer: QuantLinear) -> IntegerWeight:
    """Lay out the weight of ``layer``, on the layer's device; its stored tensors are not touched.

    Raises:
        ValueError: scales whose last 8 bits of a float32 are in use where a zero point has to go.
    """
    weights, activations = layer.format.weights, layer.format.activations
    assert activations is not None
    width, rows, columns = WIDTHS[weights.bits], layer.out_features, layer.in_features
    group_size = PER_CHANNEL if weights.group_size >= columns else weights.group_size
    plane = plane_of(width, group_size)
    blocks = -(-columns // block_columns(width, plane))
    padded, device = -(-rows // ROWS) * ROWS, layer.weight_scale.device
    tiles = torch.zeros(blocks, padded, plane, dtype=torch.int8, device=device)
    sums = None
    if not activations.symmetric:
        sums = torch.zeros(padded, dtype=torch.int32 if group_size == PER_CHANNEL else torch.float32, device=device)
    zero_point = values.zero_points(layer)
    for first, last in values.row_chunks(rows, columns):
        codes = _fields(layer, zero_point, first, last)
        _lay_out(codes, width, tiles[:, first:last])
        if sums is not None:
            sums[first:last] = _sums(codes, layer, zero_point, first, last).to(sums.dtype)
    kept = zero_point if isinstance(zero_point, Tensor) and (width < 8 or not values.fit_int8(layer)) else None
    steps = _steps(layer, kept)
    groups = 1 if group_size == PER_CHANNEL else -(-blocks * block_columns(width, plane) // group_size)
    return IntegerWeight(
        tiles=tiles,
        steps=F.pad(steps.t(), (0, padded - rows, 0, groups - steps.shape[1])).contiguous(),
        sums=sums,
        width=width,
        zero_point=kept is not None,
        group_size=group_size,
        out_features=rows,
        in_features=columns,
    )


def restore(weight: IntegerWeight, layer: QuantLinear) -> Tensor:
    """``weight_packed`` (or ``weight``) of ``layer``, which ``weight`` was made of, bit for bit."""
    bits, parts, zero_point = layer.format.weights.bits, [], values.zero_points(layer)
    for first, last in values.row_chunks(weight.out_features, weight.in_features):
        fields = _taken_out(weight, first, last)
        if layer.format.storage == "int8":
            parts.append(fields.view(torch.int8))
        elif weight.width < 8:
            parts.append(pack_rows(fields >> _moved(layer), bits))
        elif values.fit_int8(layer):
            parts.append(values.write(fields.view(torch.int8), layer, zero_point, first, last))
        else:
            parts.append(pack_rows(fields ^ 0x80, bits))
    return torch.cat(parts)


def _fields(layer: QuantLinear, zero_point: Tensor | int, first: int, last: int) -> Tensor:
    """[last - first, in_features] uint8, what a field of the layout holds."""
    bits = layer.format.weights.bits
    if WIDTHS[bits] == 8 and values.fit_int8(layer):
        return values.read(layer, zero_point, first, last).view(torch.uint8)
    codes = unpack_rows(layer.weight_packed[first:last], bits, layer.in_features)
    return signed_from_codes(codes).view(torch.uint8) if bits == 8 else codes << _moved(layer)


def _moved(layer: QuantLinear) -> int:
    """Bits that symmetric codes are moved up by, to the top of a field that is wider than they are."""
    weights = layer.format.weights
    return WIDTHS[weights.bits] - weights.bits if weights.symmetric and weights.bits < 5 else 0


def _lay_out(fields: Tensor, width: int, tiles: Tensor) -> None:
    """Write ``fields`` [rows, columns] uint8 to ``tiles`` [blocks, rows, plane]."""
    blocks, _, plane = tiles.shape
    padded = F.pad(fields, (0, blocks * block_columns(width, plane) - fields.shape[1]))
    split = padded.view(len(fields), blocks, 8 // width, plane).permute(2, 1, 0, 3)  # [fields, blocks, rows, plane]
    for index, field in enumerate(split):
        tiles |= (field << (width * index)).view(torch.int8)


def _taken_out(weight: IntegerWeight, first: int, last: int) -> Tensor:
    """[last - first, in_features] uint8, what ``_lay_out`` wrote."""
    width = weight.width
    shifts = torch.arange(8 // width, dtype=torch.uint8, device=weight.tiles.device)[:, None] * width
    tile = weight.tiles[:, first:last].view(torch.uint8).movedim(1, 0)[:, :, None]  # [rows, blocks, 1, plane]
    fields = (tile >> shifts) & (2**width - 1)
    return fields.flatten(1)[:, : weight.in_features].contiguous()


def _sums(fields: Tensor, layer: QuantLinear, zero_point: Tensor | int, first: int, last: int) -> Tensor:
    """[last - first], int64 or float64: ``IntegerWeight.sums``."""
    weights, columns = layer.format.weights, layer.in_features
    group = columns if weights.group_size == PER_CHANNEL else min(weights.group_size, columns)
    width = WIDTHS[weights.bits]
    codes = fields.view(torch.int8) if width == 8 else fields >> _moved(layer)
    zero = zero_point[first:last].long() if isinstance(zero_point, Tensor) else torch.tensor(zero_point)
    if width == 8:  # the byte has lost its zero point, or 128
        zero = torch.zeros_like(zero) if values.fit_int8(layer) else zero - 128
    pad = F.pad(codes, (0, -columns % group)).view(last - first, -1, group).sum(dim=-1, dtype=torch.int64)
    lengths = torch.full((pad.shape[1],), group, device=pad.device)
    lengths[-1] = columns - group * (pad.shape[1] - 1)
    sums = pad - zero.to(pad.device) * lengths  # [rows, groups]
    if group == columns:
        return sums[:, 0] * _factor(layer)
    return (sums * layer.weight_scale[first:last].double()).sum(dim=1)


def _factor(layer: QuantLinear) -> int:
    """What the operands of a symmetric weight are multiplied by."""
    weights = layer.format.weights
    return 1 << (8 - weights.bits) if weights.symmetric and weights.bits < 5 else 1


def _steps(layer: QuantLinear, zero_point: Tensor | None) -> Tensor:
    """[out_features, groups] int32: scales divided by ``_factor``, and zero points where operands have some."""
    steps = (layer.weight_scale.float() / _factor(layer)).view(torch.int32)
    if zero_point is None:
        return steps
    if (steps & 0xFF).any():
        raise ValueError(f"scales of {layer.weight_scale.dtype} leave no room for zero points; half and bfloat16 do")
    return steps | zero_point
