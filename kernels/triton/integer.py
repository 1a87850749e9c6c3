"""Rounded activations times rounded weights in integers on GPUs, through Triton: W8A8, W4A8, W3A8, W4A4 and their like.

The codes of the input come from ``input_codes.py`` as int8, whatever their width; the weight stays packed and becomes
int8 in registers (``integer_layout.py``). Products are added up in int32 on the matrix units and scales applied to the
sums (``integer_kernels.py``), so that the result is exact but for a few float32 roundings and that of the output.

``refuses``, ``pack``, ``restore`` and ``run`` are the row of ``kernels/dispatch.py``. A launch neither allocates an
unknown size nor waits for the device, so calls can be captured in graphs; programs that share a tile add up in a fixed
order, so a repeated call gives the same bits. Rows whose scale is not a number, as that of a row that is not finite,
come out as NaN.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.cpu import values
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.library import define
from quantkit.kernels.triton import compat, configs, integer_configs, integer_layout, weight_only
from quantkit.kernels.triton.configs import Config
from quantkit.kernels.triton.integer_configs import Problem
from quantkit.kernels.triton.integer_layout import IntegerWeight
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

_MIN_BLOCK_N = 64
_COUNTED_TILES_M = 4
"""Tiles of tokens that may be shared between programs; with more there are programs enough."""
_VECTOR = 16
"""Bytes of the widest load; codes whose rows are no multiple of it are copied into rows that are."""
SUMMED = (16, 256)
"""Tokens and columns that a program of ``sums_kernel`` adds up at once."""


@dataclass(frozen=True, eq=False)
class Packed:
    """What ``run`` reads instead of the stored weight."""

    weight: IntegerWeight
    arrived: Tensor
    """[tiles] int32, zeros between calls: how many of the programs that share a tile are through. One per layer, so
    that streams can run different layers at once; the same layer must not run on two streams at once."""


def refuses(layer: QuantLinear, device: torch.device) -> str | None:
    """Why the layer cannot run here on ``device``; None if it can. See ``dispatch.Implementation``."""
    weights, activations = layer.format.weights, layer.format.activations
    if device.type != "cuda":
        return f"for GPUs, not {device.type}"
    if not compat.AVAILABLE:
        return compat.MISSING
    if activations is None:
        return "activations are not rounded"
    if activations.granularity == "group":
        return f"for one scale per token, not per {activations.group_size} channels"
    if weights.levels != "uniform":
        return f"{weights.levels} codes are not evenly spaced"
    if not integer_layout.supports(layer.format):
        return f"groups of {weights.group_size} are no multiple of {integer_layout.GROUP_UNIT}"
    if layer.weight_scale.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"for models of 16 or 32 bits, not {str(layer.weight_scale.dtype).removeprefix('torch.')}"
    most = integer_layout.most_columns(layer.format)
    if most is not None and layer.in_features > most:
        return f"sums of {layer.in_features} products may overflow int32"
    return weight_only.incapable(device)


def pack(layer: QuantLinear) -> Packed | None:
    """Lay out the weight of ``layer`` on its device; None where ``restore`` could not give back every bit of it, or
    float32 scales leave no room for zero points."""
    if not values.has_clean_padding(layer):
        return None
    try:
        weight = integer_layout.from_layer(layer)
    except ValueError:
        return None
    tiles = weight.tiles.shape[1] // _MIN_BLOCK_N * _COUNTED_TILES_M
    return Packed(weight, torch.zeros(tiles, dtype=torch.int32, device=weight.tiles.device))


def restore(packed: Packed, layer: QuantLinear) -> Tensor:
    """The stored codes."""
    return integer_layout.restore(packed.weight, layer)


def run(x: Tensor, layer: QuantLinear, packed: Packed) -> Tensor:
    """[..., in_features] -> [..., out_features] in the dtype of ``x``: what ``reference.linear`` computes."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], layer.out_features)
    y = multiply(layer.input_codes(x), packed, layer.bias, x.dtype)
    return y.view(*x.shape[:-1], layer.out_features)


def multiply(x: InputCodes, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of ``x`` [rows, in_features], any number of rows, with the weight: [rows, out_features] in ``dtype``.

    ``bias`` [out_features]; None: there is none.
    """
    weight = packed.weight
    y: Tensor = _op(
        x.codes,
        x.scale,
        x.zero_point,
        weight.tiles,
        weight.steps,
        weight.sums,
        bias,
        packed.arrived,
        weight.width,
        weight.zero_point,
        weight.group_size,
        weight.out_features,
        dtype,
    )
    return y


def _linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, tiles: Tensor, steps: Tensor, sums: Tensor | None,
    bias: Tensor | None, arrived: Tensor, width: int, weight_zero_point: bool, group_size: int, out_features: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operator ``quantkit::integer_linear``: arguments as in ``InputCodes``, ``IntegerWeight`` and ``Packed``."""
    rows = codes.shape[0]
    out = scale.new_empty(rows, out_features, dtype=dtype)
    if rows == 0:
        return out
    blocks, padded, plane = tiles.shape
    codes = _vectorised(codes)
    columns = codes.shape[1]
    x_sums = _group_sums(codes, group_size, steps.shape[0]) if width == 8 and weight_zero_point else None

    def launch(config: Config) -> None:
        count = -(-rows // config.block_m) * -(-out_features // config.block_n)
        split = config.split if count <= arrived.numel() else 1
        partial = None
        if split > 1:
            kind = torch.int32 if group_size == PER_CHANNEL else torch.float32
            partial = scale.new_empty(split, rows, out_features, dtype=kind)
        with weight_only.on_device(codes):
            _kernels().matmul_kernel[(count, split)](
                codes,
                scale,
                zero_point,
                x_sums,
                tiles,
                steps,
                None if zero_point is None else sums,
                bias,
                out,
                partial,
                arrived if split > 1 else None,
                rows,
                out_features,
                columns,
                blocks,
                padded,
                codes.stride(0),
                scale.stride(0),
                0 if zero_point is None else zero_point.stride(0),
                WIDTH=width,
                PLANE=plane,
                ZERO_POINT=weight_zero_point,
                GROUP=0 if group_size == PER_CHANNEL else group_size,
                SPLIT=split,
                REGISTERS=integer_configs.from_registers(device),
                PTX=codes.is_cuda and torch.version.hip is None,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                STAGES=config.stages,
                TALL=integer_configs.TALL,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,  # Triton's default differs between its versions
            )

    problem = Problem(
        width=width,
        plane=plane,
        group_size=group_size,
        zero_point=weight_zero_point,
        out_features=out_features,
        blocks=blocks,
        rows=integer_configs.bucket(rows),
    )
    device = configs.device_of(codes.device)
    measurable = codes.is_cuda and not torch.cuda.is_current_stream_capturing()
    launch(integer_configs.choose(problem, device, launch if measurable else None))
    return out


def _vectorised(codes: Tensor) -> Tensor:
    """``codes`` [rows, columns], or with zeros behind each row, so that rows start where the widest loads may."""
    columns = codes.shape[1]
    if codes.stride(1) == 1 and columns % _VECTOR == 0 and codes.stride(0) % _VECTOR == 0:
        return codes
    return F.pad(codes, (0, -columns % _VECTOR)).contiguous()


def _group_sums(codes: Tensor, group_size: int, groups: int) -> Tensor:
    """[groups, rows] int32: the sum of each row's ``codes`` [rows, columns] in each group of columns."""
    rows, columns = codes.shape
    width = columns if group_size == PER_CHANNEL else group_size
    out = codes.new_empty(groups, rows, dtype=torch.int32)
    with weight_only.on_device(codes):
        _kernels().sums_kernel[(-(-rows // SUMMED[0]), groups)](
            codes,
            out,
            rows,
            columns,
            width,
            codes.stride(0),
            BLOCK_M=SUMMED[0],
            BLOCK_K=SUMMED[1],
            STAGES=4,
            num_warps=4,
            num_stages=4,
            enable_fp_fusion=True,
        )
    return out


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.integer_kernels")


def _shape_only(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, tiles: Tensor, steps: Tensor, sums: Tensor | None,
    bias: Tensor | None, arrived: Tensor, width: int, weight_zero_point: bool, group_size: int, out_features: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return scale.new_empty(codes.shape[0], out_features, dtype=dtype)


_op = define(
    "integer_linear(Tensor codes, Tensor scale, Tensor? zero_point, Tensor tiles, Tensor steps, Tensor? sums, "
    "Tensor? bias, Tensor arrived, int width, bool weight_zero_point, int group_size, int out_features, "
    "ScalarType dtype) -> Tensor",
    _linear,
    _shape_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
