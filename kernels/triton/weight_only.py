"""The weight-only product on GPUs: y = x @ W.T + bias with W packed (``layout.py``), through Triton.

Up to ``configs.crossover`` rows the packed weight is multiplied as it is; above, it is written out into a scratch once
per call and multiplied by the library's matrix product, which reads every weight once per tile of rows and would have
to unpack it as often.

``refuses``, ``pack``, ``restore`` and ``run`` are the row of ``kernels/dispatch.py``. A launch neither allocates an
unknown size nor waits for the device, so calls can be captured in graphs; programs that share a tile add up in a fixed
order, so a repeated call gives the same bits.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.quantized import NF4_LEVELS
from quantkit.kernels.cpu import values
from quantkit.kernels.lacking import Lacking
from quantkit.kernels.library import define
from quantkit.kernels.triton import compat, configs, layout
from quantkit.kernels.triton.configs import Config, Problem
from quantkit.kernels.triton.layout import PlanarWeight
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

DENSE_ROWS = 64
"""Rows of the weight that a program writes out; divides ``layout.ROWS``."""
_MIN_BLOCK_N = 64
_COUNTED_TILES_M = 4
"""Tiles of tokens that may be shared between programs; with more there are programs enough."""


@dataclass(frozen=True, eq=False)
class Packed:
    """What ``run`` reads instead of the stored weight."""

    weight: PlanarWeight
    levels: Tensor | None
    """[16] in the dtype of the scales; NF4 only."""
    arrived: Tensor
    """[tiles] int32, zeros between calls: how many of the programs that share a tile are through. One per layer, so
    that streams can run different layers at once; the same layer must not run on two streams at once."""


def refuses(layer: QuantLinear, device: torch.device) -> str | None:
    """Why the layer cannot run here on ``device``; None if it can. See ``dispatch.Implementation``."""
    if device.type != "cuda":
        return f"for GPUs, not {device.type}"
    if not compat.AVAILABLE:
        return compat.MISSING
    weights, dtype = layer.format.weights, layer.weight_scale.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"for half and bfloat16 models, not {str(dtype).removeprefix('torch.')}"
    if weights.bits not in layout.WIDTHS:
        return f"for 2, 3, 4 and 8 bits, not {weights.bits}"
    if not layout.supports(layer.format):
        return f"groups of {weights.group_size} are no multiple of {layout.PLANE}"
    return incapable(device)


def incapable(device: torch.device) -> Lacking | None:
    """Why kernels of this package do not run on the GPU ``device``; None if they do."""
    if not torch.cuda.is_available():
        return Lacking("there is no GPU")
    kind = configs.device_of(device).kind
    if kind in ("gfx90a", "gfx942", "gfx950") or (kind.startswith("sm_") and int(kind[3:]) >= 80):
        return None
    return Lacking(f"for sm_80 and later, gfx90a, gfx942 and gfx950, not {kind}")


def pack(layer: QuantLinear) -> Packed | None:
    """Lay out the weight of ``layer`` on its device; None where ``restore`` could not give back every bit of it."""
    if not values.has_clean_padding(layer):
        return None
    weight = layout.from_layer(layer)
    tiles = weight.words.shape[1] // _MIN_BLOCK_N * _COUNTED_TILES_M
    return Packed(
        weight=weight,
        levels=NF4_LEVELS.to(layer.weight_scale) if weight.levels == "nf4" else None,
        arrived=torch.zeros(tiles, dtype=torch.int32, device=weight.words.device),
    )


def restore(packed: Packed, layer: QuantLinear) -> Tensor:
    """The stored codes."""
    return layout.restore(packed.weight, layer)


def run(x: Tensor, layer: QuantLinear, packed: Packed) -> Tensor:
    """[..., in_features] -> [..., out_features] in the dtype of ``x``: what ``reference.linear`` computes."""
    weight = packed.weight
    y: Tensor = _op(
        layer.changed_input(x, kernels=x.is_cuda),
        weight.words,
        weight.high,
        weight.steps,
        packed.levels,
        layer.bias,
        packed.arrived,
        weight.bits,
        weight.zero_point,
        weight.group_size,
        weight.out_features,
    )
    return y


class _Weight(NamedTuple):
    """Arguments of the operator that describe the weight."""

    words: Tensor
    high: Tensor | None
    steps: Tensor
    levels: Tensor | None
    bits: int
    zero_point: bool
    group_size: int
    out_features: int

    def pointers(self) -> tuple[Tensor | None, ...]:
        return self.words, self.high, self.steps, self.levels

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What both kernels are compiled for. ``enable_fp_fusion``: Triton's default differs between its versions."""
        return {
            "BITS": self.bits,
            "ZERO_POINT": self.zero_point,
            "GROUP": 0 if self.group_size == PER_CHANNEL else self.group_size,
            "DTYPE": triton_dtype(dtype),
            "PTX": self.words.is_cuda and torch.version.hip is None,
            "enable_fp_fusion": True,
        }


def _linear(
    x: Tensor,
    words: Tensor,
    high: Tensor | None,
    steps: Tensor,
    levels: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    bits: int,
    zero_point: bool,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The operator ``quantkit::weight_only_linear``: arguments as in ``PlanarWeight`` and ``Packed``."""
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    rows = flat.shape[0]
    if rows == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    weight = _Weight(words, high, steps, levels, bits, zero_point, group_size, out_features)
    device = configs.device_of(x.device)
    if rows > configs.crossover(device):
        return F.linear(x, _dequantize(weight, columns, x.dtype), bias)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    out = x.new_empty(rows, out_features)

    def launch(config: Config) -> None:
        _multiply(flat, weight, bias, arrived, out, config)

    problem = Problem(
        bits=bits,
        group_size=group_size,
        zero_point=zero_point,
        levels="uniform" if levels is None else "nf4",
        dtype=str(x.dtype).removeprefix("torch."),
        out_features=out_features,
        blocks=words.shape[0],
        rows=configs.bucket(rows),
    )
    measurable = x.is_cuda and not torch.cuda.is_current_stream_capturing()
    launch(configs.choose(problem, device, launch if measurable else None))
    return out.view(*x.shape[:-1], out_features)


def _multiply(x: Tensor, weight: _Weight, bias: Tensor | None, arrived: Tensor, out: Tensor, config: Config) -> None:
    """``out`` [rows, out_features] = ``x`` [rows, columns] @ W.T + ``bias``."""
    (rows, columns), out_features = x.shape, weight.out_features
    blocks, padded, _ = weight.words.shape
    tiles = -(-rows // config.block_m) * -(-out_features // config.block_n)
    split = config.split if tiles <= arrived.numel() else 1
    partial = x.new_empty(split, rows, out_features, dtype=torch.float32) if split > 1 else None
    with on_device(x):
        _kernels().matmul_kernel[(tiles, split)](
            x,
            *weight.pointers(),
            bias,
            out,
            partial,
            arrived if split > 1 else None,
            rows,
            out_features,
            columns,
            blocks,
            padded,
            x.stride(0),
            SCALE_AFTER=config.scale_after,
            SPLIT=split,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
            **weight.constants(x.dtype),
        )


def _dequantize(weight: _Weight, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, columns] in ``dtype``, that of the scales."""
    blocks, padded, _ = weight.words.shape
    dense = weight.words.new_empty(weight.out_features, columns, dtype=dtype)
    with on_device(dense):
        _kernels().dequantize_kernel[(-(-weight.out_features // DENSE_ROWS), blocks)](
            *weight.pointers(),
            dense,
            weight.out_features,
            columns,
            padded,
            BLOCK_N=DENSE_ROWS,
            num_warps=4,
            **weight.constants(dtype),
        )
    return dense


@cache
def triton_dtype(dtype: torch.dtype) -> Any:
    """``tl.float16`` for ``torch.float16``; float32 is for the interpreter, which has no bfloat16."""
    tl = compat.module("language")
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.weight_only_kernels")


def on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device, whatever device its arguments are on; CPU: the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _shape_only(
    x: Tensor,
    words: Tensor,
    high: Tensor | None,
    steps: Tensor,
    levels: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    bits: int,
    zero_point: bool,
    group_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_op = define(
    "weight_only_linear(Tensor x, Tensor words, Tensor? high, Tensor steps, Tensor? levels, Tensor? bias, "
    "Tensor arrived, int bits, bool zero_point, int group_size, int out_features) -> Tensor",
    _linear,
    _shape_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
