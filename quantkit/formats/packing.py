"""Codes of 1 to 8 bits in 32-bit words, laid out as compressed-tensors lays them out.

Each row is one bit stream: code j occupies bits j*b .. j*b+b-1, least significant bit first. The stream is cut into
little-endian 32-bit words and padded with zeros to a whole word at the end of the row. Codes of 3, 5, 6 and 7 bits
straddle words; nothing but the end of a row is padding.

Eight codes of b bits are exactly b bytes of the stream, so one int64 lane does eight codes at a time: bytes that hold
one code each are moved together in three steps (pairs, fours, eights), and the low b bytes of the lane are the stream.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import QuantkitError

_CHUNK_CODES = 2**19
"""Codes handled at once: 512 KiB of one-byte codes and as much again for each int64 temporary, which a cache holds."""

if sys.byteorder != "little":
    raise QuantkitError("the packed formats are little-endian and this machine is not; run on a little-endian machine.")


def words_per_row(columns: int, bits: int) -> int:
    """32-bit words that hold one row of ``columns`` codes."""
    return -(-columns * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the columns.

    Args:
        codes: [rows, columns] uint8, values 0 .. 2**bits - 1.
        bits: width of a code, 1 .. 8.

    Returns:
        [rows, ceil(columns * bits / 32)] int32.
    """
    _check(codes, torch.uint8, bits)
    rows, columns = codes.shape
    words = words_per_row(columns, bits)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    for first, last in _chunks(rows, columns):
        padded = F.pad(codes[first:last], (0, -columns % 32)).reshape(-1)  # copies only a width that needs padding
        stream = _take_bytes(_squeeze(padded.view(torch.int64), bits), bits)
        packed[first:last] = stream.view(last - first, -1).view(torch.int32)[:, :words]
    return packed


def unpack_rows(packed: Tensor, bits: int, columns: int, out: Tensor | None = None) -> Tensor:
    """Inverse of ``pack_rows``.

    Args:
        packed: [rows, ceil(columns * bits / 32)] int32.
        bits: width of a code, 1 .. 8.
        columns: codes per row.
        out: [rows, columns] uint8 to write into.

    Returns:
        [rows, columns] uint8.
    """
    _check(packed, torch.int32, bits)
    rows, words = packed.shape
    if words != words_per_row(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {words_per_row(columns, bits)} words per row, packed has {words}"
        )
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device) if out is None else out
    for first, last in _chunks(rows, columns):
        padded = F.pad(packed[first:last], (0, -words % bits)).reshape(-1)
        lanes = _spread(_put_bytes(padded.view(torch.uint8).view(-1, bits), bits), bits)
        codes[first:last] = lanes.view(torch.uint8).view(last - first, -1)[:, :columns]
    return codes


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """[rows, groups] uint8 -> [ceil(rows * bits / 32), groups] int32: packed along the output axis."""
    return pack_rows(zero_point.t().contiguous(), bits).t().contiguous()


def unpack_zero_points(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of ``pack_zero_points``: [ceil(rows * bits / 32), groups] int32 -> [rows, groups] uint8."""
    return unpack_rows(packed.t().contiguous(), bits, rows).t().contiguous()


def _check(tensor: Tensor, dtype: torch.dtype, bits: int) -> None:
    if tensor.dim() != 2 or tensor.dtype != dtype:
        raise ValueError(f"expected a 2-D {dtype} tensor, got {tensor.dtype} {tuple(tensor.shape)}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; codes have 1 to 8")


def _chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_CODES // max(columns, 1))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


@cache
def _steps(bits: int) -> tuple[tuple[int, int, int], ...]:
    """(shift, low, high) of each step from one code per byte to eight codes side by side.

    Before a step, fields of ``width`` code bits start every ``pitch`` bits. The step moves every second field down by
    ``shift`` to join its neighbour; ``low`` and ``high`` are where the two then lie.
    """
    steps = []
    width, pitch = bits, 8
    while pitch < 64:
        low = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * pitch))
        steps.append((pitch - width, low, low << width))
        width, pitch = 2 * width, 2 * pitch
    return tuple(steps)


def _squeeze(lanes: Tensor, bits: int) -> Tensor:
    """int64 lanes of eight one-byte codes -> lanes whose low 8 * bits bits are the stream."""
    if bits == 8:
        return lanes
    for shift, low, high in _steps(bits):
        lanes = (lanes >> shift).bitwise_and_(high).bitwise_or_(lanes & low)
    return lanes


def _spread(lanes: Tensor, bits: int) -> Tensor:
    """Inverse of ``_squeeze``."""
    if bits == 8:
        return lanes
    for shift, low, high in reversed(_steps(bits)):
        lanes = (lanes & high).bitwise_left_shift_(shift).bitwise_or_(lanes & low)
    return lanes


def _unit(bits: int) -> torch.dtype:
    """The widest integer that divides a lane's ``bits`` stream bytes: fewer, larger elements to copy."""
    return {0: torch.int64, 4: torch.int32, 2: torch.int16, 6: torch.int16}.get(bits % 8, torch.uint8)


def _take_bytes(lanes: Tensor, bits: int) -> Tensor:
    """int64 lanes -> [lanes, bits] uint8, the low ``bits`` bytes of each."""
    unit = _unit(bits)
    parts = lanes.view(-1, 1).view(unit)
    return parts[:, : bits // unit.itemsize].contiguous().view(torch.uint8)


def _put_bytes(stream: Tensor, bits: int) -> Tensor:
    """[lanes, bits] uint8 -> int64 lanes, zero above the low ``bits`` bytes."""
    unit = _unit(bits)
    lanes = torch.zeros(stream.shape[0], 8 // unit.itemsize, dtype=unit, device=stream.device)
    lanes[:, : bits // unit.itemsize] = stream.view(unit)
    return lanes.view(torch.int64).view(-1)
