"""What every implementation of a quantised linear must compute, in plain PyTorch on any device.

    y = fake_quantize(op(x * t + s)) @ W.T + bias    W = (codes - zero_point) * scale, or levels[codes] * scale

    t, s: [in_features], the scale and shift of ``LayerInputs``, op: a matrix (online.py); each of the four steps only
    where the format has it

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

from quantkit.formats.layer import LayerInputs
from quantkit.formats.packing import unpack_rows, unpack_zero_points
from quantkit.formats.quantized import NF4_LEVELS
from quantkit.kernels import online
from quantkit.kernels.grid_gradient import gradients
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
    y: Tensor = _Product.apply(layer.changed_input(x), layer)
    return y


def transform_input(x: Tensor, inputs: LayerInputs, activations: ActivationScheme | None) -> Tensor:
    """What of ``x`` [..., in_features] meets the weight: scaled, shifted, multiplied by a matrix, rounded, in the dtype
    of ``x``.

    Static activations whose scale is not calibrated yet are rounded over the range of ``x``.
    """
    if inputs.scale is not None:
        x = x * inputs.scale.to(x.dtype)
    if inputs.shift is not None:
        x = x + inputs.shift.to(x.dtype)
    x = online.apply(x, inputs)
    if activations is not None:
        x = fake_quantize(x, activations, inputs.static_scale, inputs.static_zero_point, inputs.clip)
    return x


def fake_quantize(
    x: Tensor,
    scheme: ActivationScheme,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: Tensor | None = None,
) -> Tensor:
    """Round ``x`` [..., features] to a grid, as compressed-tensors simulates it.

    All arithmetic is in the dtype of ``x``. The gradient goes straight through the rounding, and is 0 where a static
    grid cuts ``x`` off. With ``clip`` the grid itself has a gradient: what it cuts off moves with its ends, what it
    rounds has the slope q - x / step to the step (Esser et al., LSQ, arXiv 1902.08153, eq. 3), and both go on to
    ``clip`` and to the least and largest value of the range.

    Args:
        scheme: a token is a row of the last dimension; a group is ``group_size`` neighbours in it, the last one of a
            row may be shorter.
        scale: [1], the step of a static grid; None: one over the range of each token, group or of all of ``x``.
        zero_point: [1], the signed code of 0 on a static grid; None: symmetric.
        clip: [2], shares of the lower and of the upper end of those ranges; without ``scale`` only. None: all of it.
    """
    if x.numel() == 0:
        return x
    if torch.is_grad_enabled() and (x.requires_grad or (clip is not None and clip.requires_grad)):
        rounded: Tensor
        if clip is not None:
            rounded = _Clipped.apply(x, clip, scheme)
        else:
            rounded = _StraightThrough.apply(x, scheme, scale, zero_point)
        return rounded
    if scale is not None:
        return _to_grid(x, scheme.bits, scale.to(x.dtype), None if zero_point is None else zero_point.to(x.dtype))
    return _to_own_grids(x, scheme, clip)


def _to_own_grids(x: Tensor, scheme: ActivationScheme, clip: Tensor | None) -> Tensor:
    if scheme.granularity != "group":
        return _to_own_grid(x, scheme, clip)
    assert scheme.group_size is not None
    whole = x.shape[-1] // scheme.group_size
    split = whole * scheme.group_size
    parts = [x[..., :split].unflatten(-1, (whole, scheme.group_size)), x[..., split:].unsqueeze(-2)]
    return torch.cat([_to_own_grid(part, scheme, clip).flatten(-2) for part in parts if part.numel()], dim=-1)


def grid_over(low: Tensor, high: Tensor, scheme: ActivationScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The step in ``dtype`` and the signed code of 0 (None: symmetric) of grids from ``low`` to ``high``, both finite.

    The symmetric step is absmax / ((2**bits - 1) / 2): all 2**bits codes are used, and the largest positive value is
    clipped by half a step.
    """
    lowest, highest, steps = _codes(scheme.bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (torch.maximum(-low, high) / (steps / 2) if scheme.symmetric else (high - low) / steps).to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    return scale, None if scheme.symmetric else (lowest - low / scale).clamp(lowest, highest).round()


def _to_own_grid(x: Tensor, scheme: ActivationScheme, clip: Tensor | None) -> Tensor:
    """Round to a grid over the range of all of ``x`` (granularity: tensor) or of each row of its last dimension."""
    if scheme.granularity == "tensor":
        low, high = torch.aminmax(x)
    else:  # one after the other they take a fraction of aminmax's time
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if clip is not None:
        shares = clip.to(x.dtype)
        low, high = low * shares[0], high * shares[1]
    return _to_grid(x, scheme.bits, *grid_over(low, high, scheme, x.dtype))


def _to_grid(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    lowest, highest, _ = _codes(bits)
    codes = x / scale  # the one tensor of its size that is made here: fresh memory costs more than arithmetic
    if zero_point is None:
        return codes.clamp_(lowest, highest).round_().mul_(scale)
    return codes.add_(zero_point).clamp_(lowest, highest).round_().sub_(zero_point).mul_(scale)


def _codes(bits: int) -> tuple[int, int, int]:
    """The smallest and the largest signed code, and the steps between them."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2**bits - 1


def row_blocks(layer: QuantLinear) -> Iterator[tuple[int, int, Tensor]]:
    """The dequantised weight in order: (first row, last row + 1, [rows, in_features] in the dtype of the scales).

    Each block is overwritten by the next, and by the next call on the same thread: use it before going on.
    """
    weights, dtype, device = layer.format.weights, layer.weight_scale.dtype, layer.weight_scale.device
    stored = layer.stored_weight()
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
            block.copy_(stored[first:last])
        else:
            codes = unpacked[: block.numel()].view(-1, columns)
            unpack_rows(stored[first:last], weights.bits, columns, out=codes)
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


class _StraightThrough(torch.autograd.Function):
    """``fake_quantize``, with the gradient of what it stands for: x inside the grid's range, its ends outside."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scheme: ActivationScheme, scale: Tensor | None, zero_point: Tensor | None
    ) -> Tensor:
        rounded = fake_quantize(x, scheme, scale, zero_point)  # there is no gradient in here
        if scale is not None:
            ctx.save_for_backward((rounded - x).abs() <= scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        return grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad, None, None, None


class _Clipped(torch.autograd.Function):
    """``fake_quantize`` to grids whose ends have gradients; on the way back its steps are computed once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, scheme: ActivationScheme) -> Tensor:
        ctx.scheme = scheme
        ctx.save_for_backward(x, clip)
        return _to_own_grids(x.detach(), scheme, clip.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, clip = ctx.saved_tensors
        found = gradients(x, clip, ctx.scheme, grad)
        of_x, of_clip = (part if need else None for part, need in zip(found, ctx.needs_input_grad[:2], strict=True))
        return of_x, of_clip, None


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
