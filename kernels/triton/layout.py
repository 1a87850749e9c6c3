"""The weight as the weight-only kernels read it, made once at load out of the stored form, and back.

A block is BLOCK = 32 * fields input columns. It is stored as one tile [rows, 32] of 16-bit words, and a word holds
``fields`` codes that lie 32 columns apart:

    words[block, row, i] = sum_j  code[row, block * BLOCK + 32 * j + i] << (width * j)        j < fields = 16 / width

Field j of a tile is therefore the weight of 32 neighbouring columns: a plane, which multiplies 32 neighbouring inputs
without any shuffling. The rows of a tile follow each other, so a program reads one stretch of memory per block.

    bits   width   fields   columns per block
    8      8       2        64
    4      4       4        128
    3      2       8        256       the third bits are in ``high[block, row, i]``, one byte
    2      2       8        256

Rows are padded to ROWS, columns to whole blocks: codes 0 with scale 0. A scale and its zero point share a 32-bit word:

    steps[group, row] = bits of the float32 scale | zero point

The last 13 bits of a half and the last 16 of a bfloat16 are 0 in float32, a zero point takes 8. So they are one load,
and one of 4 bytes: Triton cannot fetch less ahead of time, and a scale that is fetched when it is needed costs a round
trip to memory for every block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.layer import codes_from_signed, signed_from_codes
from quantkit.formats.packing import pack_rows, unpack_rows, unpack_zero_points
from quantkit.formats.quantized import QuantizedWeight
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.formats.layer import LayerFormat
    from quantkit.layers.quant_linear import QuantLinear

PLANE = 32
"""Columns of a plane: two K steps of a 16-bit matrix instruction, and the smallest group that is supported."""
ROWS = 128
"""Rows are padded to a multiple of this, the tallest tile of a kernel."""
HIGH_BITS = (2, 4, 6, 0, 1, 3, 5, 7)
"""Field of a 3-bit word -> where its third bit is in the byte: most where they have to go in a float's mantissa, or as
far off as others, so that two or three shifts do for all (``weight_only_kernels.unpack_ptx``)."""
WIDTHS = {8: 8, 4: 4, 3: 2, 2: 2}
"""Bits of a code -> bits of it in a 16-bit word."""
_CHUNK_CODES = 2**22
"""Codes unpacked at once while repacking; what a load needs on top of the weight is a few times as many bytes."""


@dataclass(frozen=True, eq=False)
class PlanarWeight:
    """One quantised matrix [out_features, in_features] in the layout above; all tensors are on one device."""

    words: Tensor
    """[blocks, rows, 32] int16."""
    high: Tensor | None
    """[blocks, rows, 32] uint8, the third bits; only with 3 bits."""
    steps: Tensor
    """[groups, rows] int32, scales and zero points."""
    zero_point: bool
    """Whether ``steps`` has zero points; else they are 2**(bits - 1), or levels have none."""
    bits: int
    group_size: int
    """Columns per row of ``steps``, which divides a block or is a multiple of it; PER_CHANNEL: one row in all."""
    stored_group_size: int
    """As the format has it. Where it neither divides a block nor is a multiple of one, scales are repeated."""
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Of the stored scales."""
    levels: Literal["uniform", "nf4"] = "uniform"


def block_columns(bits: int) -> int:
    """Input columns of one block."""
    return PLANE * 16 // WIDTHS[bits]


def supports(layer: LayerFormat) -> bool:
    """Whether the weight of ``layer`` can be laid out: 2, 3, 4 or 8 bits, groups of a multiple of 32 columns."""
    weights = layer.weights
    return weights.bits in WIDTHS and (weights.group_size == PER_CHANNEL or weights.group_size % PLANE == 0)


def from_layer(layer: QuantLinear) -> PlanarWeight:
    """Lay out the weight of ``layer``, on the layer's device; its stored tensors are not touched.

    Raises:
        ValueError: scales that are neither half nor bfloat16 numbers, which leave no room for a zero point.
    """
    weights, zero_point = layer.format.weights, None
    if not weights.symmetric:
        zero_point = unpack_zero_points(layer.weight_zero_point, weights.bits, layer.out_features)
    words, high = _empty(weights.bits, layer.out_features, layer.in_features, layer.weight_scale.device)
    for first, last in _chunks(layer.out_features, layer.in_features):
        if layer.format.storage == "int8":
            rows = codes_from_signed(layer.weight[first:last])
        else:
            rows = unpack_rows(layer.weight_packed[first:last], weights.bits, layer.in_features)
        _lay_out(rows, weights.bits, words[:, first:last], None if high is None else high[:, first:last])
    group_size = _group_size(weights.group_size, weights.bits, layer.in_features)
    steps = layer.weight_scale.float().view(torch.int32)
    if layer.weight_scale.dtype not in (torch.float16, torch.bfloat16) and (steps & 0xFF).any():
        raise ValueError(f"scales of {layer.weight_scale.dtype} do not fit the layout; it holds half and bfloat16")
    if zero_point is not None:
        steps = steps | zero_point
    return PlanarWeight(
        words=words,
        high=high,
        steps=_by_group(steps, weights.group_size, group_size, words, weights.bits),
        zero_point=zero_point is not None,
        bits=weights.bits,
        group_size=group_size,
        stored_group_size=weights.group_size,
        out_features=layer.out_features,
        in_features=layer.in_features,
        dtype=layer.weight_scale.dtype,
        levels=weights.levels,
    )


def codes(planar: PlanarWeight, first: int, last: int) -> Tensor:
    """[last - first, in_features] uint8, the codes of some rows as they were stored."""
    width = WIDTHS[planar.bits]
    shifts = torch.arange(16 // width, device=planar.words.device)[:, None]
    words = planar.words[:, first:last].int().movedim(1, 0)[:, :, None]  # [rows, blocks, 1, 32]
    fields = (words >> (width * shifts)) & (2**width - 1)
    if planar.high is not None:
        high = planar.high[:, first:last].int().movedim(1, 0)[:, :, None]
        fields |= ((high >> torch.tensor(HIGH_BITS, device=high.device)[:, None]) & 1) << 2
    return fields.flatten(1)[:, : planar.in_features].to(torch.uint8)


def to_quantized(planar: PlanarWeight) -> QuantizedWeight:
    """Inverse of ``from_layer``: codes, scales and zero points as they were stored."""
    rows, size = planar.out_features, planar.stored_group_size
    groups = 1 if size == PER_CHANNEL else -(-planar.in_features // size)
    repeats = 1 if planar.group_size == PER_CHANNEL else size // planar.group_size
    steps = planar.steps[::repeats][:groups, :rows].t().contiguous()
    return QuantizedWeight(
        codes=codes(planar, 0, rows),
        scale=(steps & ~0xFF).view(torch.float32).to(planar.dtype),
        zero_point=(steps & 0xFF).to(torch.uint8) if planar.zero_point else None,
        bits=planar.bits,
        group_size=size,
        levels=planar.levels,
    )


def restore(planar: PlanarWeight, layer: QuantLinear) -> Tensor:
    """``weight_packed`` (or ``weight``) of ``layer``, which ``planar`` was made of, bit for bit."""
    parts = []
    for first, last in _chunks(planar.out_features, planar.in_features):
        rows = codes(planar, first, last)
        parts.append(signed_from_codes(rows) if layer.format.storage == "int8" else pack_rows(rows, planar.bits))
    return torch.cat(parts)


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
            high |= (field >> 2) << HIGH_BITS[index]


def _group_size(stored: int, bits: int, columns: int) -> int:
    """Columns per scale of the layout: groups that straddle blocks are cut where the blocks end."""
    if stored == PER_CHANNEL or stored >= columns:
        return PER_CHANNEL
    return stored if stored % block_columns(bits) == 0 else math.gcd(stored, block_columns(bits))


def _by_group(steps: Tensor, stored: int, group_size: int, words: Tensor, bits: int) -> Tensor:
    """[out_features, stored groups] -> [groups, rows], for as many columns as ``words`` [blocks, rows, 32] have."""
    blocks, rows, _ = words.shape
    groups = 1
    if group_size != PER_CHANNEL:
        steps = steps.repeat_interleave(stored // group_size, dim=1)
        groups = -(-blocks * block_columns(bits) // group_size)
    return F.pad(steps.t(), (0, rows - steps.shape[0], 0, groups - steps.shape[1])).contiguous()
