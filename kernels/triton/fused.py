"""Norms and gated activations that come out as codes, on GPUs through Triton: what is read once is rounded at once.

    norm_quantize     norm(x) or norm(x + residual)    Llama's and Gemma's RMSNorm, LayerNorm (``fused_kernels.py``)
    gated_quantize    silu(gate) * up, gelu(gate) * up

and on the way the scale and shift of the layer's input, as in ``activation.py``. Codes are those that
``input_codes.quantize`` makes of the values here; these are PyTorch's but for the order of a row's sum and the last
digit of an exponential, so a value may be its neighbour and its code another one next to the middle of two.
A launch neither allocates an unknown size nor waits for the device.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.library import define
from quantkit.kernels.triton import activation, weight_only
from quantkit.recipe import ActivationScheme

NormKind = Literal["llama", "gemma", "layer"]
"""llama: RMSNorm whose result is rounded before it is multiplied by the weight; gemma: RMSNorm times 1 + weight, all in
float32; layer: LayerNorm."""
Activation = Literal["silu", "gelu"]
"""gelu: the approximation with tanh."""


class Norm(NamedTuple):
    """A norm over the last dimension."""

    kind: NormKind
    weight: Tensor
    """[columns]"""
    bias: Tensor | None
    """[columns]; kind layer only."""
    eps: float


class Normed(NamedTuple):
    """What ``norm_quantize`` returns; shapes of x unless said otherwise."""

    codes: InputCodes
    values: Tensor | None
    """The norm itself, where it was asked for."""
    residual: Tensor | None
    """x + residual, where there was one."""


def unsuited(scheme: ActivationScheme, inputs: LayerInputs) -> str | None:
    """Why these kernels do not make such codes; None if they do."""
    if inputs.op != "none":
        return f"for inputs that no matrix is applied to, not {inputs.op}"
    if scheme.granularity == "group":
        return f"for one scale per token, not per {scheme.group_size} channels"
    if scheme.granularity == "tensor" and inputs.static_scale is None:
        return "for ranges of single tokens, not of a whole tensor"
    return None


def runs_on(x: Tensor) -> bool:
    """Is ``x`` where kernels run, and of a dtype that they take?"""
    return x.is_cuda and x.dtype in activation.DTYPES


def norm_quantize(
    x: Tensor, norm: Norm, inputs: LayerInputs, scheme: ActivationScheme, residual: Tensor | None = None,
    values: bool = False, packed: bool = False,
) -> Normed:  # fmt: skip
    """The codes of the norm of ``x`` [..., columns], per token or on a static grid.

    Args:
        inputs: of the layer that reads the norm: its scale, shift, static range and clip.
        residual: of the shape of x, added to it first.
        values: return the norm itself, too.
        packed: two codes to a byte, as ``activation.quantize_packed`` has them.

    Raises:
        ValueError: the kernel does not make such codes, or rows are longer than ``activation.WHOLE_COLUMNS``.
    """
    columns = x.shape[-1]
    _check(scheme, inputs, columns, packed)
    if columns > activation.WHOLE_COLUMNS:
        raise ValueError(f"for rows of up to {activation.WHOLE_COLUMNS} columns, not {columns}")
    *made, total, normed = _norm_op(
        x, residual, norm.weight, norm.bias, norm.eps, norm.kind, inputs.scale, inputs.shift,
        *activation.grid_tensors(inputs), scheme.bits, scheme.symmetric, packed, values,
    )  # fmt: skip
    codes = activation.as_codes((made[0], made[1], made[2]), scheme)
    return Normed(codes, normed if values else None, None if residual is None else total)


def gated_quantize(
    gate: Tensor, up: Tensor, function: Activation, inputs: LayerInputs, scheme: ActivationScheme, packed: bool = False
) -> InputCodes:
    """The codes of ``function(gate) * up`` for two tensors [..., columns], per token or on a static grid.

    Args:
        inputs: of the layer that reads the product: its scale, shift, static range and clip.
        packed: two codes to a byte, as ``activation.quantize_packed`` has them.

    Raises:
        ValueError: the kernel does not make such codes.
    """
    _check(scheme, inputs, up.shape[-1], packed)
    made = _gated_op(
        gate, up, function, inputs.scale, inputs.shift, *activation.grid_tensors(inputs), scheme.bits, scheme.symmetric,
        packed,
    )  # fmt: skip
    return activation.as_codes(made, scheme)


def _check(scheme: ActivationScheme, inputs: LayerInputs, columns: int, packed: bool) -> None:
    reason = unsuited(scheme, inputs)
    if reason is not None:
        raise ValueError(reason)
    if packed and (scheme.bits > 4 or columns % 2):
        raise ValueError(f"two codes of {scheme.bits} bits of {columns} columns do not fill bytes")


def _norm_codes(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
    scale: Tensor | None, shift: Tensor | None, clip: Tensor | None, static_scale: Tensor | None,
    static_zero_point: Tensor | None, bits: int, symmetric: bool, packed: bool, values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``quantkit::norm_codes``: arguments as in ``Norm``, ``LayerInputs`` and ``ActivationScheme``."""
    made, total, normed = _norm_room(x, residual, symmetric, packed, values)
    if x.numel() == 0:
        return *made, total, normed
    rows = activation.flat(x)
    added = None if residual is None else activation.flat(residual)
    columns = rows.shape[1]
    grid = activation.Grid(clip, static_scale, static_zero_point, bits, symmetric)
    block = activation.power(columns)
    with weight_only.on_device(rows):
        _kernels().norm_kernel[(len(rows),)](
            rows,
            added,
            weight,
            bias,
            scale,
            shift,
            clip if static_scale is None else None,
            static_scale,
            static_zero_point,
            *made.pointers(),
            None if added is None else total,
            normed if values else None,
            columns,
            rows.stride(0),
            0 if added is None else added.stride(0),
            eps,
            1 / columns,
            KIND=kind,
            PACKED=packed,
            BLOCK=block,
            num_warps=activation.warps(block),
            **grid.constants(rows),
            **activation.numerics(rows),
        )
    return *made, total, normed


def _gated_codes(
    gate: Tensor, up: Tensor, function: str, scale: Tensor | None, shift: Tensor | None, clip: Tensor | None,
    static_scale: Tensor | None, static_zero_point: Tensor | None, bits: int, symmetric: bool, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``quantkit::gated_codes``: arguments as in ``LayerInputs`` and ``ActivationScheme``."""
    made = activation.empty(up, up.shape[-1], symmetric, packed)
    if up.numel() == 0:
        return made
    gates, ups = activation.flat(gate), activation.flat(up)
    columns = ups.shape[1]
    grid = activation.Grid(clip, static_scale, static_zero_point, bits, symmetric)
    block = activation.block_of(columns)
    with weight_only.on_device(ups):
        _kernels().gated_kernel[(len(ups),)](
            gates,
            ups,
            scale,
            shift,
            clip if static_scale is None else None,
            static_scale,
            static_zero_point,
            *made.pointers(),
            columns,
            gates.stride(0),
            ups.stride(0),
            ACTIVATION=function,
            PACKED=packed,
            BLOCK=block,
            WHOLE=block >= columns,
            num_warps=activation.warps(block),
            **grid.constants(ups),
            **activation.numerics(ups),
        )
    return made


def _norm_room(
    x: Tensor, residual: Tensor | None, symmetric: bool, packed: bool, values: bool
) -> tuple[activation.Made, Tensor, Tensor]:
    """(codes, x + residual, norm); [0] where one of these two is not there."""
    return (
        activation.empty(x, x.shape[-1], symmetric, packed),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape if values else 0),
    )


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.fused_kernels")


def _norm_shapes_only(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
    scale: Tensor | None, shift: Tensor | None, clip: Tensor | None, static_scale: Tensor | None,
    static_zero_point: Tensor | None, bits: int, symmetric: bool, packed: bool, values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made, total, normed = _norm_room(x, residual, symmetric, packed, values)
    return *made, total, normed


def _gated_shapes_only(
    gate: Tensor, up: Tensor, function: str, scale: Tensor | None, shift: Tensor | None, clip: Tensor | None,
    static_scale: Tensor | None, static_zero_point: Tensor | None, bits: int, symmetric: bool, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return activation.empty(up, up.shape[-1], symmetric, packed)


_INPUTS = (
    "Tensor? scale, Tensor? shift, Tensor? clip, Tensor? static_scale, Tensor? static_zero_point, int bits, "
    "bool symmetric, bool packed"
)
_norm_op = define(
    "norm_codes(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, str kind, "
    f"{_INPUTS}, bool values) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_codes,
    _norm_shapes_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
_gated_op = define(
    f"gated_codes(Tensor gate, Tensor up, str function, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _gated_codes,
    _gated_shapes_only,
    ("CUDA", "CPU"),
)
