"""The weight-only product on GPUs: y = x @ W.T + bias with W packed (``layout.py``), through Triton.

Up to ``configs.crossover`` rows the packed weight is multiplied as it is; above, it is written out into a scratch once
per call and multiplied by the library's matrix product, which reads every weight once per tile of rows and would have
to unpack it as often.

``takes``, ``pack`` and ``run`` are the row of ``kernels/dispatch.py``. A launch neither allocates an unknown size nor
waits for the device, so calls can be captured in graphs; programs that share a tile add up in a fixed order, so a
repeated call gives the same bits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.quantized import NF4_LEVELS
from quantkit.kernels.triton import compat, configs, layout, weight_only_kernels
from quantkit.kernels.triton.configs import Config, Problem
from quantkit.kernels.triton.layout import PlanarWeight
from quantkit.recipe import PER_CHANNEL

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

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


def takes(x: Tensor, layer: QuantLinear) -> bool:
    """Half or bfloat16 on a GPU that has matrix instructions for both; no gradient is wanted; see ``layout.supports``.
    """
    scale = layer.weight_scale
    return (
        compat.AVAILABLE
        and x.is_cuda
        and x.device == scale.device
        and x.dtype == scale.dtype
        and x.dtype in (torch.float16, torch.bfloat16)
        and not (x.requires_grad and torch.is_grad_enabled())
        and layout.supports(layer.format)
        and _capable(x.device)
    )


def _capable(device: torch.device) -> bool:
    kind = configs.device_of(device).kind
    return kind in ("gfx90a", "gfx942", "gfx950") or (kind.startswith("sm_") and int(kind[3:]) >= 80)


def pack(layer: QuantLinear) -> Packed:
    """Lay out the weight of ``layer`` on its device; to be done again after the layer has moved or changed."""
    weight = layout.from_layer(layer)
    tiles = weight.words.shape[1] // _MIN_BLOCK_N * _COUNTED_TILES_M
    return Packed(
        weight=weight,
        levels=NF4_LEVELS.to(weight.scale) if weight.levels == "nf4" else None,
        arrived=torch.zeros(tiles, dtype=torch.int32, device=weight.words.device),
    )


def run(x: Tensor, layer: QuantLinear, packed: Packed) -> Tensor:
    """[..., in_features] -> [..., out_features] in the dtype of ``x``: what ``reference.linear`` computes."""
    weight = packed.weight
    y: Tensor = torch.ops.quantkit.weight_only_linear(
        layer.changed_input(x),
        weight.words,
        weight.high,
        weight.scale,
        weight.zero_point,
        packed.levels,
        layer.bias,
        packed.arrived,
        weight.bits,
        weight.group_size,
        weight.out_features,
    )
    return y


def _linear(
    x: Tensor,
    words: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The operator ``quantkit::weight_only_linear``: arguments as in ``PlanarWeight`` and ``Packed``."""
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    rows = flat.shape[0]
    weight = words, high, scale, zero_point, levels
    if rows == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    device = configs.device_of(x.device)
    if rows > configs.crossover(device):
        y = F.linear(flat, _dequantize(weight, bits, group_size, out_features, columns), bias)
        return y.view(*x.shape[:-1], out_features)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    out = x.new_empty(rows, out_features)

    def launch(config: Config) -> None:
        _multiply(flat, weight, bias, arrived, out, bits, group_size, config)

    problem = Problem(
        bits,
        group_size,
        zero_point is not None,
        "uniform" if levels is None else "nf4",
        str(x.dtype),
        out_features,
        words.shape[0],
        configs.bucket(rows),
    )
    measurable = x.is_cuda and not torch.cuda.is_current_stream_capturing()
    launch(configs.choose(problem, device, launch if measurable else None))
    return out.view(*x.shape[:-1], out_features)


_Weight = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]
"""Words, high, scale, zero point, levels."""


def _multiply(
    x: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    arrived: Tensor,
    out: Tensor,
    bits: int,
    group_size: int,
    config: Config,
) -> None:
    """``out`` [rows, out_features] = ``x`` [rows, columns] @ W.T + ``bias``."""
    (rows, columns), out_features = x.shape, out.shape[1]
    blocks, padded, _ = weight[0].shape
    tiles = -(-rows // config.block_m) * -(-out_features // config.block_n)
    split = config.split if tiles <= arrived.numel() else 1
    partial = x.new_empty(split, rows, out_features, dtype=torch.float32) if split > 1 else None
    with _on(x):
        weight_only_kernels.matmul_kernel[(tiles, split)](
            x,
            *weight,
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
            num_warps=config.warps,
            num_stages=config.stages,
            **_constants(x, bits, group_size),
        )


def _dequantize(weight: _Weight, bits: int, group_size: int, out_features: int, columns: int) -> Tensor:
    """The weight [out_features, columns] in the dtype of the scales."""
    words, _, scale, _, _ = weight
    dense = scale.new_empty(out_features, columns)
    blocks, padded, _ = words.shape
    block_n = 64
    with _on(words):
        weight_only_kernels.dequantize_kernel[(-(-out_features // block_n), blocks)](
            *weight,
            dense,
            out_features,
            columns,
            padded,
            BLOCK_N=block_n,
            num_warps=4,
            **_constants(scale, bits, group_size),
        )
    return dense


def _constants(like: Tensor, bits: int, group_size: int) -> dict[str, Any]:
    """Arguments that both kernels are compiled for. ``enable_fp_fusion``: Triton's default differs between versions."""
    tl = compat.tl
    dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[like.dtype]
    return {
        "BITS": bits,
        "GROUP": 0 if group_size == PER_CHANNEL else group_size,
        "DTYPE": dtype,
        "PTX": like.is_cuda and torch.version.hip is None and has_ptx(bits, like.dtype),
        "enable_fp_fusion": True,
    }


def has_ptx(bits: int, dtype: torch.dtype) -> bool:
    """Whether two codes can be made floats of ``dtype`` in one register; 8 bits do not fit bfloat16's mantissa."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and bits < 8)


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, whatever device its arguments are on; CPU: the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _shape_only(
    x: Tensor,
    words: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# Library.define costs a call a third of what custom_op does (2.5 to 3.7 microseconds), as much as the kernel itself.
_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define(
    "weight_only_linear(Tensor x, Tensor words, Tensor? high, Tensor scale, Tensor? zero_point, Tensor? levels, "
    "Tensor? bias, Tensor arrived, int bits, int group_size, int out_features) -> Tensor"
)
_library.impl("weight_only_linear", _linear, "CUDA")
_library.impl("weight_only_linear", _linear, "CPU")  # for Triton's interpreter only; ``takes`` never picks it
torch.library.register_fake("quantkit::weight_only_linear", _shape_only, lib=_library)
