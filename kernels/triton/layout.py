"""The weight as the weight-only kernels read it, made once at load out of the stored form, and back.

A block is BLOCK = 32 * fields input columns. It is stored as one tile [rows, 32] of 16-bit words, and a word holds
``fields`` codes that lie 32 columns apart:

    words[block, row, i] = sum_j  code[row, block * BLOCK + 32 * j + i] << (width * j)        j < fields = 16 / width

Field j of a tile is therefore the weight of 32 neighbouring columns: a plane, which multiplies 32 neighbouring inputs
without any shuffling. The rows of a tile follow each other, so a program reads one stretch of memory per block.

    bits   width   fields   columns per block
    8      8       2        64
    4      4       4        128
    3      2       8        256       the code's high bit is bit j of ``high[block, row, i]``, one byte
    2      2       8        256

Rows are padded to ROWS, columns to whole blocks: codes 0 with scale 0. Scales and zero points are [groups, rows].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.layer import codes_from_signed
from quantkit.formats.packing import unpack_rows, unpack_zero_points
from quantkit.formats.quantized import QuantizedWeight
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.formats.layer import LayerFormat
    from quantkit.layers.quant_linear import QuantLinear

PLANE = 32
"""Columns of a plane: two K steps of a 16-bit matrix instruction, and the smallest group that is supported."""
ROWS = 128
"""Rows are padded to a multiple of this, the tallest tile of a kernel."""
WIDTHS = {8: 8, 4: 4, 3: 2, 2: 2}
"""Bits of a code -> bits of it in a 16-bit word."""
_CHUNK_CODES = 2**24
"""Codes unpacked at once while repacking; what a load needs on top of the weight is a few times as many bytes."""


@dataclass(frozen=True, eq=False)
class PlanarWeight:
    """One quantised matrix [out_features, in_features] in the layout above; all tensors are on one device."""

    words: Tensor
    """[blocks, rows, 32] int16."""
    high: Tensor | None
    """[blocks, rows, 32] uint8, the third bits; only with 3 bits."""
    scale: Tensor
    """[groups, rows] in the dtype of the stored scales."""
    zero_point: Tensor | None
    """[groups, rows] uint8; None: 2**(bits - 1), or levels."""
    bits: int
    group_size: int
    """Columns per row of ``scale``, which divides a block or is a multiple of it; PER_CHANNEL: one row in all."""
    stored_group_size: int
    """As the format has it. Where it neither divides a block nor is a multiple of one, scales are repeated."""
    out_features: int
    in_features: int
    levels: Literal["uniform", "nf4"] = "uniform"


def block_columns(bits: int) -> int:
    """Input columns of one block."""
    return PLANE * 16 // WIDTHS[bits]


def supports(layer: LayerFormat) -> bool:
    """Whether the weight of ``layer`` can be laid out: 2, 3, 4 or 8 bits, groups of a multiple of 32 columns."""
    weights = layer.weights
    return weights.bits in WIDTHS and (weights.group_size == PER_CHANNEL or weights.group_size % PLANE == 0)


def from_layer(layer: QuantLinear) -> PlanarWeight:
    """Lay out the weight of ``layer``, on the layer's device; its stored tensors are not touched."""
    weights, zero_point = layer.format.weights, None
    if not weights.symmetric:
        zero_point = unpack_zero_points(layer.weight_zero_point, weights.bits, layer.out_features)
    words, high = _empty(weights.bits, layer.out_features, layer.in_features, layer.weight_scale.device)
    for first, last in _chunks(layer.out_features, layer.in_features):
        if layer.format.storage == "int8":
            codes = codes_from_signed(layer.weight[first:last])
        else:
            codes = unpack_rows(layer.weight_packed[first:last], weights.bits, layer.in_features)
        _lay_out(codes, weights.bits, words[:, first:last], None if high is None else high[:, first:last])
    group_size = _group_size(weights.group_size, weights.bits, layer.in_features)
    columns = words.shape[0] * block_columns(weights.bits)
    arguments = weights.group_size, group_size, words.shape[1], columns
    return PlanarWeight(
        words=words,
        high=high,
        scale=_by_group(layer.weight_scale, *arguments),
        zero_point=None if zero_point is None else _by_group(zero_point, *arguments),
        bits=weights.bits,
        group_size=group_size,
        stored_group_size=weights.group_size,
        out_features=layer.out_features,
        in_features=layer.in_features,
        levels=weights.levels,
    )


def to_quantized(planar: PlanarWeight) -> QuantizedWeight:
    """Inverse of ``from_layer``: codes, scales and zero points as they were stored."""
    width, rows, columns = WIDTHS[planar.bits], planar.out_features, planar.in_features
    shifts = torch.arange(16 // width, device=planar.words.device)
    words = planar.words[:, :rows].int().movedim(1, 0)[:, :, None]  # [rows, blocks, 1, 32]
    codes = (words >> (width * shifts)[:, None]) & (2**width - 1)
    if planar.high is not None:
        high = planar.high[:, :rows].int().movedim(1, 0)[:, :, None]
        codes |= ((high >> shifts[:, None]) & 1) << 2
    size = planar.stored_group_size
    groups = 1 if size == PER_CHANNEL else -(-columns // size)
    repeats = 1 if planar.group_size == PER_CHANNEL else size // planar.group_size

    def by_row(values: Tensor) -> Tensor:
        return values[::repeats][:groups, :rows].t().contiguous()

    return QuantizedWeight(
        codes=codes.flatten(1)[:, :columns].to(torch.uint8),
        scale=by_row(planar.scale),
        zero_point=None if planar.zero_point is None else by_row(planar.zero_point),
        bits=planar.bits,
        group_size=size,
        levels=planar.levels,
    )


def _empty(bits: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    shape = -(-columns // block_columns(bits)), -(-rows // ROWS) * ROWS, PLANE
    words = torch.zeros(shape, dtype=torch.int16, device=device)
    return words, torch.zeros(shape, dtype=torch.uint8, device=device) if bits == 3 else None


def _chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_CODES // max(columns, 1))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _lay_out(codes: Tensor, bits: int, words: Tensor, high: Tensor | None) -> None:
    """Write ``codes`` [rows, columns] uint8 to ``words`` and ``high`` [blocks, rows, 32]."""
    width = WIDTHS[bits]
    padded = F.pad(codes, (0, -codes.shape[1] % block_columns(bits)))
    fields = padded.view(len(codes), -1, 16 // width, PLANE).permute(2, 1, 0, 3)  # [fields, blocks, rows, 32]
    for index, field in enumerate(fields):
        words |= (field & (2**width - 1)).to(torch.int16) << (width * index)
        if high is not None:
            high |= (field >> 2) << index


def _group_size(stored: int, bits: int, columns: int) -> int:
    """Columns per scale of the layout: groups that straddle blocks are cut where the blocks end."""
    if stored == PER_CHANNEL or stored >= columns:
        return PER_CHANNEL
    return stored if stored % block_columns(bits) == 0 else math.gcd(stored, block_columns(bits))


def _by_group(values: Tensor, stored: int, group_size: int, rows: int, columns: int) -> Tensor:
    """[out_features, stored groups] -> [groups, rows]; zeros, or cut, where ``columns`` have more groups or fewer."""
    groups = 1
    if group_size != PER_CHANNEL:
        values = values.repeat_interleave(stored // group_size, dim=1)
        groups = -(-columns // group_size)
    return F.pad(values.t(), (0, rows - values.shape[0], 0, groups - values.shape[1])).contiguous()
