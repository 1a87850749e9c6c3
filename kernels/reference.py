"""What every implementation of a quantised linear must compute, in plain PyTorch on any device.

    y = fake_quantize(x * input_scale) @ W.T + bias        W = (codes - zero_point) * scale, or levels[codes] * scale

The packed weight is unpacked a few rows at a time into a scratch that stays allocated, so a call needs no memory that
grows with the layer. The weight's arithmetic is done in the dtype of the scales, as compressed-tensors does it: both
get the same weights bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.packing import unpack_rows, unpack_zero_points
from quantkit.formats.quantized import NF4_LEVELS
from quantkit.recipe import PER_CHANNEL, ActivationScheme

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

SCRATCH_BYTES = 8 * 2**20
"""Dequantised rows at once: larger blocks leave the cache between unpacking and multiplying, smaller ones split the
product into too many calls."""


class _Scratch(threading.local):
    """Flat tensors that a thread keeps and reuses, one for each dtype and device."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        kept = self.buffers.get((dtype, device))
        if kept is None or kept.numel() < elements:
            # A tensor born in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                kept = self.buffers[dtype, device] = torch.empty(elements, dtype=dtype, device=device)
        return kept


_scratch = _Scratch()


def linear(x: Tensor, layer: QuantLinear) -> Tensor:
    """[..., in_features] -> [..., out_features]; ``x`` has the dtype of the layer's scales, and so has the result."""
    if layer.format.input_scale:
        x = x * layer.input_scale_vector
    if layer.format.activations:
        x = fake_quantize(x, layer.format.activations)
    y: Tensor = _Product.apply(x, layer)
    return y


def fake_quantize(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Round ``x`` [..., features] to a grid over its own range, as compressed-tensors simulates it.

    A token is a row of the last dimension. All arithmetic is in the dtype of ``x``. The symmetric step is
    absmax / ((2**bits - 1) / 2): all 2**bits codes are used, and the largest positive value is clipped by half a step.
    """
    if x.numel() == 0:
        return x
    lowest, highest, steps = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1, 2**scheme.bits - 1
    low, high = torch.aminmax(x, dim=-1, keepdim=True) if scheme.granularity == "token" else torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / (steps / 2) if scheme.symmetric else (high - low) / steps
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    codes = x / scale
    if scheme.symmetric:
        return codes.clamp(lowest, highest).round() * scale
    zero_point = (lowest - low / scale).clamp(lowest, highest).round()
    return ((codes + zero_point).clamp(lowest, highest).round() - zero_point) * scale


def row_blocks(layer: QuantLinear) -> Iterator[tuple[int, int, Tensor]]:
    """The dequantised weight in order: (first row, last row + 1, [rows, in_features] in the dtype of the scales).

    Each block is overwritten by the next, and by the next call on the same thread: use it before going on.
    """
    weights, dtype, device = layer.format.weights, layer.weight_scale.dtype, layer.weight_scale.device
    columns = layer.in_features
    step = max(1, SCRATCH_BYTES // (columns * dtype.itemsize))
    values = _scratch.take(step * columns, dtype, device)
    unpacked = _scratch.take(step * columns, torch.uint8, device)
    zero_point = None
    if not weights.symmetric:
        zero_point = unpack_zero_points(layer.weight_zero_point, weights.bits, layer.out_features)
    for first in range(0, layer.out_features, step):
        last = min(first + step, layer.out_features)
        block = values[: (last - first) * columns].view(-1, columns)
        if layer.format.storage == "int8":
            block.copy_(layer.weight[first:last])
        else:
            codes = unpacked[: block.numel()].view(-1, columns)
            unpack_rows(layer.weight_packed[first:last], weights.bits, columns, out=codes)
            if weights.levels == "nf4":
                torch.index_select(NF4_LEVELS.to(block), 0, codes.view(-1).int(), out=block.view(-1))
            elif zero_point is None:
                block.copy_(codes.sub_(2 ** (weights.bits - 1)).view(torch.int8))
            else:
                block.copy_(codes)
                for part, shift in _groups(block, zero_point[first:last], weights.group_size):
                    part.sub_(shift)
        for part, scale in _groups(block, layer.weight_scale[first:last], weights.group_size):
            part.mul_(scale)
        yield first, last, block


def _groups(block: Tensor, values: Tensor, group_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of ``block`` [rows, columns], each with the part of ``values`` [rows, groups] that broadcasts over it."""
    if group_size == PER_CHANNEL:
        yield block, values
        return
    whole = block.shape[1] // group_size
    yield block[:, : whole * group_size].unflatten(1, (whole, group_size)), values[:, :whole, None]
    if whole < values.shape[1]:  # a short last group
        yield block[:, whole * group_size :], values[:, whole:]


class _Product(torch.autograd.Function):
    """x @ W.T + bias; the gradient of x is taken through W, which is unpacked again rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        for first, last, block in row_blocks(layer):
            bias = None if layer.bias is None else layer.bias[first:last]
            y[..., first:last] = F.linear(x, block, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_y,) = grads
        grad_x = grad_y.new_zeros(*grad_y.shape[:-1], ctx.layer.in_features)
        for first, last, block in row_blocks(ctx.layer):
            grad_x += grad_y[..., first:last] @ block
        return grad_x, None
