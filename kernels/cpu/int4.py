"""4-bit codes on x86 through ``aten::_weight_int4pack_mm_for_cpu``, bfloat16 only: in other dtypes it is slower than
a dense product.

The operator computes x @ W.T, W[n, k] = (q[n, k] - 8) * scale[k // G, n] + zero[k // G, n], G in 32, 64, 128, 256, in
float32 with bfloat16 x, scale and zero, and rounds once at the end.

- Symmetric codes are that with zero = 0. So are codes of 2 and 3 bits: q = code - zero point + 8 is within 0 .. 15.
- With 4-bit zero points, zero = (8 - zero_point) * scale takes up to 11 bits, of which bfloat16 has 8; ``rest`` holds
  the others, and meets the sums of x over each group. Without it whole groups would be shifted by up to a seventieth
  of a step, which grows with the mean of x rather than with its spread.
- Larger groups are cut into equal ones that share a scale, columns are filled up to a whole group with codes 8 (that
  is 0) and rows up to 64 with scale 0.

From ``FEW_ROWS`` rows of x up, unpacking to bfloat16 and a dense product is faster than the operator, whose time grows
with each row.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.kernels.cpu import values
from quantkit.kernels.lacking import Lacking
from quantkit.kernels.library import define
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

FEW_ROWS = 96
"""Rows of x up to which the operator is faster than unpacking; ``quantkit bench kernels`` shows where they cross."""

_GROUPS = (256, 128, 64, 32)
_ROWS = 64
"""Rows of the weight are filled up to a multiple of this: whole blocks of every order below."""
_UNPACKED_COLUMNS = 256
"""Rows of the weight that are unpacked at once: few enough to be in the cache still when they are multiplied."""


class Int4(NamedTuple):
    """A weight [out_features, in_features], both filled up."""

    codes: Tensor
    """[rows, columns / 2] uint8 in the order of torch's packing operator."""
    scale_zero: Tensor
    """[columns / group, rows, 2] bfloat16."""
    rest: Tensor | None
    """[columns / group, rows] bfloat16: what the zeros lost when they were rounded; None: nothing."""
    zero_point: Tensor | None
    """[columns / group, rows] int8; None: 8."""
    group: int


def refuses(layer: QuantLinear, device: torch.device) -> str | None:
    weights = layer.format.weights
    if device.type != "cpu":
        return f"for CPUs, not {device.type}"
    if layer.format.activations is not None:
        return "activations are rounded"
    if weights.levels != "uniform":
        return f"{weights.levels} codes are not evenly spaced"
    if weights.bits > 4:
        return f"{weights.bits}-bit codes do not fit into 4 bits"
    if layer.weight_scale.dtype != torch.bfloat16:
        return f"for bfloat16 models, not {str(layer.weight_scale.dtype).removeprefix('torch.')}"
    if weights.group_size != PER_CHANNEL and weights.group_size % _GROUPS[-1]:
        return f"groups of {weights.group_size} are no multiple of {_GROUPS[-1]}"
    if _block() is None:
        return Lacking("torch's 4-bit operator has no vector code for this processor")
    return None


@cache
def _block() -> int | None:
    """Rows in a block of the order in which torch packs codes on this processor; None: not an order known here.

    A block of b rows is [columns, b / 2] bytes; byte i of a column has row i in its low half, row i + b/2 in its high.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    codes = torch.randint(0, 16, (_ROWS, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = _convert(codes)
    return next((block for block in (64, 32) if torch.equal(packed, _in_blocks(codes, block))), None)


def _convert(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


def _in_blocks(codes: Tensor, block: int) -> Tensor:
    """What ``_convert`` must return for ``codes`` [rows, columns] uint8."""
    rows, columns = codes.shape
    low, high = codes.view(rows // block, 2, block // 2, columns).mT.unbind(1)
    return (low | high << 4).reshape(rows, columns // 2)


def _codes(packed: Tensor, block: int) -> Tensor:
    """Inverse of ``_in_blocks``: [rows, columns] uint8."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    parts = packed.view(rows // block, columns, block // 2)
    return torch.stack([parts & 15, parts >> 4], dim=1).mT.reshape(rows, columns)


def _is_shifted(layer: QuantLinear) -> bool:
    """Are zero points taken out of the codes when they are packed?"""
    return layer.format.weights.bits < 4 or bool(layer.format.weights.symmetric)


def pack(layer: QuantLinear) -> Int4 | None:
    if not values.has_clean_padding(layer):
        return None
    rows, columns = -(-layer.out_features // _ROWS) * _ROWS, layer.in_features
    size = layer.format.weights.group_size
    group = next(g for g in _GROUPS if (columns if size == PER_CHANNEL else size) % g == 0 or g == _GROUPS[-1])
    columns = -(-columns // group) * group
    zero_point = values.zero_points(layer)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    for first, last in values.row_chunks(layer.out_features, columns, _ROWS):
        if _is_shifted(layer):
            codes = values.read(layer, zero_point, first, last).add_(8).view(torch.uint8)
        else:
            codes = unpack_rows(layer.weight_packed[first:last], 4, layer.in_features)
        filled = F.pad(codes, (0, columns - layer.in_features, 0, -(last - first) % _ROWS), value=8)
        packed[first : first + len(filled)] = _convert(filled)

    scale_zero = torch.zeros(columns // group, rows, 2, dtype=torch.bfloat16)
    scale_zero[:, : layer.out_features, 0] = _per_group(layer.weight_scale, layer, group)
    if isinstance(zero_point, int) or _is_shifted(layer):
        return Int4(packed, scale_zero, None, None, group)
    points = F.pad(_per_group(zero_point, layer, group), (0, rows - layer.out_features), value=8).to(torch.int8)
    exact = (8 - points).float() * scale_zero[..., 0].float()
    scale_zero[..., 1] = exact
    rest = (exact - scale_zero[..., 1].float()).to(torch.bfloat16)
    return Int4(packed, scale_zero, rest if rest.any() else None, points.contiguous(), group)


def _per_group(numbers: Tensor, layer: QuantLinear, group: int) -> Tensor:
    """[out_features, groups] of the format -> [columns / group, out_features]."""
    starts = torch.arange(0, layer.in_features, group)
    size = layer.format.weights.group_size
    return numbers.t()[torch.zeros_like(starts) if size == PER_CHANNEL else starts // size]


def restore(packed: Int4, layer: QuantLinear) -> Tensor:
    block = _block()
    assert block is not None
    zero_point, parts = values.zero_points(layer), []
    for first, last in values.row_chunks(layer.out_features, layer.in_features, _ROWS):
        codes = _codes(packed.codes[first : -(-last // _ROWS) * _ROWS], block)[: last - first, : layer.in_features]
        if _is_shifted(layer):
            parts.append(values.write(codes.contiguous().view(torch.int8).sub_(8), layer, zero_point, first, last))
        else:
            parts.append(pack_rows(codes.contiguous(), 4))
    return torch.cat(parts)


def few_rows(x: Tensor, layer: QuantLinear, packed: Int4) -> Tensor:
    y: Tensor = _few_rows_op(
        layer.changed_input(x), packed.codes, packed.scale_zero, packed.rest, layer.bias, packed.group,
        layer.out_features,
    )  # fmt: skip
    return y


def many_rows(x: Tensor, layer: QuantLinear, packed: Int4) -> Tensor:
    y: Tensor = _many_rows_op(
        layer.changed_input(x), packed.codes, packed.scale_zero, packed.zero_point, layer.bias, packed.group,
        layer.out_features,
    )  # fmt: skip
    return y


def _filled_up(x: Tensor, columns: int) -> Tensor:
    """[..., k] -> contiguous [rows, columns], with zeros behind."""
    flat = x.reshape(-1, x.shape[-1])
    return F.pad(flat, (0, columns - flat.shape[1])) if flat.shape[1] < columns else flat.contiguous()


def _few_rows(
    x: Tensor,
    codes: Tensor,
    scale_zero: Tensor,
    rest: Tensor | None,
    bias: Tensor | None,
    group: int,
    out_features: int,
) -> Tensor:
    flat = _filled_up(x, 2 * codes.shape[1])
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, codes, group, scale_zero)
    if rest is not None:
        sums = flat.view(len(flat), len(rest), group).sum(dim=-1, dtype=torch.float32)
        # An infinite x is infinite in y already, with the sign it should have; here it could turn into NaN.
        y += torch.nan_to_num(sums, 0.0, 0.0, 0.0).to(y.dtype) @ rest
    y = y[:, :out_features]
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], out_features).contiguous()


def _many_rows(
    x: Tensor, codes: Tensor, scale_zero: Tensor, zero_point: Tensor | None, bias: Tensor | None, group: int,
    out_features: int,
) -> Tensor:  # fmt: skip
    block = _block()
    assert block is not None
    rows, columns, half = codes.shape[0], 2 * codes.shape[1], block // 2
    flat = _filled_up(x, columns)
    y = flat.new_empty(len(flat), out_features)
    weight = flat.new_empty(columns, min(_UNPACKED_COLUMNS, rows))
    blocks = codes.view(rows // block, columns, half)
    for first in range(0, rows, _UNPACKED_COLUMNS):
        last = min(first + _UNPACKED_COLUMNS, rows)
        here, count = blocks[first // block : last // block], (last - first) // block
        dense = weight[:, : last - first]
        for part, bits in enumerate((here & 15, here >> 4)):
            signed = bits.view(torch.int8)
            if zero_point is None:
                signed.sub_(8)
            else:
                points = zero_point[:, first:last].unflatten(1, (count, 2, half))[:, :, part].transpose(0, 1)
                signed.view(count, -1, group, half).sub_(points[:, :, None])
            dense.unflatten(1, (count, 2, half))[:, :, part].copy_(signed.transpose(0, 1))
        dense.unflatten(0, (-1, group)).mul_(scale_zero[:, first:last, 0].contiguous()[:, None])
        dense = dense[:, : out_features - first]
        here_y = flat @ dense if bias is None else torch.addmm(bias[first:last], flat, dense)
        y[:, first:last] = here_y
    return y.view(*x.shape[:-1], out_features)


def _fake(
    x: Tensor,
    codes: Tensor,
    scale_zero: Tensor,
    extra: Tensor | None,
    bias: Tensor | None,
    group: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_few_rows_op = define(
    "int4_linear(Tensor x, Tensor codes, Tensor scale_zero, Tensor? rest, Tensor? bias, int group, int out_features)"
    " -> Tensor",
    _few_rows,
    _fake,
)
_many_rows_op = define(
    "int4_unpacked_linear(Tensor x, Tensor codes, Tensor scale_zero, Tensor? zero_point, Tensor? bias, int group,"
    " int out_features) -> Tensor",
    _many_rows,
    _fake,
)
