"""Errors of the kernels of inputs, keys and values that no product of a layer shows, for ``bench_gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import input_codes, online
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import fused, heads
from quantkit.kv.quantiser import MinMax
from quantkit.recipe import ActivationScheme

SHAPES = ((1, 8, 1, 128), (2, 4, 33, 80), (1, 8, 1500, 128))
"""[batch, heads, tokens, head_dim] of keys: a decoding step, sizes that fill no tile, a prompt."""
_EIGHT = ActivationScheme(bits=8)
_DTYPE = torch.bfloat16


def errors(device: torch.device) -> Iterator[tuple[str, tuple[int, ...], Callable[[], float]]]:
    """Name, shape of what it is given, and what finds the error, relative to the norm: of codes that of what they stand
    for, against codes of what was computed in float64 and rounded to bfloat16."""
    for shape in SHAPES:
        keys = torch.randn(shape, dtype=_DTYPE, device=device).mul(3)
        yield "heads @ matrix", shape, partial(_turned, keys)
        for bits, symmetric in ((4, False), (3, True)):
            yield f"heads to {bits} bits", shape, partial(_encoded, keys, MinMax(bits, symmetric))
    for rows, columns in ((1, 4096), (33, 520)):
        x, y = torch.randn(2, rows, columns, dtype=_DTYPE, device=device)
        yield "norm + quantise", (rows, columns), partial(_normed, x, y)
        yield "silu(x) * x + quantise", (rows, columns), partial(_gated, x, y)


def _turned(keys: Tensor) -> float:
    dim = keys.shape[-1]
    signs = LayerInputs(signs=torch.ones(dim, dtype=torch.int8, device=keys.device))
    rows = online.apply(torch.eye(dim, dtype=torch.float64, device=keys.device), signs)
    found = heads.multiply(keys, heads.matrix_of(rows, keys.dtype, dim**-0.5))
    return _relative(found, keys.double() @ rows)


def _encoded(keys: Tensor, kv: MinMax) -> float:
    """Of what codes stand for, against the reference's on the CPU."""
    parts = heads.encode(keys, kv.bits, kv.symmetric, 1.0, 1.0)
    dim, plain = keys.shape[-1], kv.encode(keys.cpu())
    return _relative(kv.decode(parts, dim, torch.float64).cpu(), kv.decode(plain, dim, torch.float64))


def _normed(x: Tensor, residual: Tensor) -> float:
    weight = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device).to(x.dtype)
    norm = fused.Norm("llama", weight, None, 1e-6)
    found = fused.norm_quantize(x, norm, LayerInputs(), _EIGHT, residual).codes
    total = (x + residual).double()
    want = total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    return _relative(_values(found), _coded(want))


def _gated(gate: Tensor, up: Tensor) -> float:
    found = fused.gated_quantize(gate, up, "silu", LayerInputs(), _EIGHT)
    return _relative(_values(found), _coded(F.silu(gate.double()) * up.double()))


def _coded(want: Tensor) -> Tensor:
    return _values(input_codes.quantize(want.to(_DTYPE), _EIGHT, LayerInputs()))


def _values(found: InputCodes) -> Tensor:
    return found.codes.double() * found.scale.double()


def _relative(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())
