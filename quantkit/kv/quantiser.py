"""Keys and values on evenly spaced grids, one for each token and head (FlatQuant, arXiv 2410.09426, section 4.1).

    hi = c_hi * max(0, max x)     lo = c_lo * min(0, min x)          over the head_dim numbers x of one token and head

    asymmetric:  s = (hi - lo) / (2**b - 1)             z = round(-lo / s)     lo, hi = -1, 1 where both are 0
    symmetric:   s = max(hi, -lo) / (2**(b-1) - 1)      z = 2**(b-1)           s = 1 where both are 0

    q = clamp(round(x / s) + z, 0, 2**b - 1)            read back: (q - z) * s

c_lo and c_hi are shares of the range, 1 by default. s is rounded to float16 before anything is computed with it, so
what is stored reads back as what was computed. Ties go to even codes.

Kept per token and head: codes packed as in ``formats/packing.py``, s in 2 bytes, and z, if there is one, in 1: with 4
bits and head_dim 128 that is 67 bytes, 4.19 bits per element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.kernels.triton import heads

SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16 above 0


class TokenCodec(Protocol):
    """A method that keeps each token by itself."""

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """Tensors [batch, heads, tokens, ...] for ``states`` [batch, heads, tokens, head_dim]."""

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        """[batch, heads, tokens, head_dim] in ``dtype``."""

    def round(self, states: Tensor) -> Tensor:
        """``decode`` of ``encode``, with a gradient."""


class TokenStore:
    """A ``Store`` for methods that keep each token by itself.

    Args:
        beside: tensors that the codec keeps alive.
    """

    def __init__(self, codec: TokenCodec, beside: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self._codec, self._beside = codec, beside
        self._parts: dict[str, Tensor] = {}
        self._head_dim = 0

    @property
    def length(self) -> int:
        return next(iter(self._parts.values())).shape[2] if self._parts else 0

    @property
    def elements(self) -> int:
        if not self._parts:
            return 0
        batch, heads, tokens = next(iter(self._parts.values())).shape[:3]
        return batch * heads * tokens * self._head_dim

    @property
    def grain(self) -> tuple[int, int]:
        return 0, 1

    def coded_after(self, tokens: int) -> int:
        return tokens

    def append(self, states: Tensor) -> Tensor:
        self.put(states)
        read = self.read(0, self.length, states.dtype)
        if states.requires_grad and torch.is_grad_enabled():
            return torch.cat([read[:, :, : -states.shape[2]], self._codec.round(states)], dim=2)
        return read

    @torch.no_grad()
    def put(self, states: Tensor) -> None:
        new, held = self._codec.encode(states), self._parts
        self._parts = {name: torch.cat([held[name], part], dim=2) for name, part in new.items()} if held else new
        self._head_dim = states.shape[-1]

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        parts = {name: part[:, :, first:last] for name, part in self._parts.items()}
        return self._codec.decode(parts, self._head_dim, dtype)

    def keep(self, first: int, last: int) -> None:
        self.change(lambda part: part[:, :, first:last].clone())  # a view would keep the rest alive

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._parts = {name: change(part) for name, part in self._parts.items()}

    def tensors(self) -> Iterable[Tensor]:
        yield from self._parts.values()
        yield from self._beside()

    def state(self) -> dict[str, Tensor]:
        return self._parts | {"head_dim": torch.tensor(self._head_dim)}

    def load(self, state: dict[str, Tensor]) -> None:
        self._head_dim = int(state["head_dim"])
        self._parts = {name: part for name, part in state.items() if name != "head_dim"}


@dataclass(frozen=True)
class MinMax:
    """The quantiser above; a ``Method`` and a ``TokenCodec``."""

    bits: int
    """2 .. 8"""
    symmetric: bool = False
    low: float | Tensor = 1.0
    """c_lo; a tensor may be learned."""
    high: float | Tensor = 1.0

    def store(self) -> TokenStore:
        return TokenStore(self)

    def round(self, states: Tensor) -> Tensor:
        """Gradients go straight through the roundings and are 0 where a code is clamped (c_lo and c_hi then get
        them)."""
        codes, scale, zero_point = self._grid(states)
        return ((codes - zero_point) * scale).to(states.dtype)

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """``codes`` int32 [.., tokens, ceil(head_dim * bits / 32)], ``scale`` float16 [.., tokens, 1] and, if
        asymmetric, ``zero_point`` uint8 [.., tokens, 1]."""
        if heads.encodes(states):
            return heads.encode(states, self.bits, self.symmetric, self.low, self.high)
        codes, scale, zero_point = self._grid(states)
        rows = pack_rows(codes.to(torch.uint8).reshape(-1, states.shape[-1]), self.bits)
        parts = {"codes": rows.view(*states.shape[:-1], -1), "scale": scale.half()}
        return parts if self.symmetric else parts | {"zero_point": zero_point.to(torch.uint8)}

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        packed, computed = parts["codes"], wide(dtype)
        rows = unpack_rows(packed.reshape(-1, packed.shape[-1]), self.bits, head_dim)
        zero_point = 2 ** (self.bits - 1) if self.symmetric else parts["zero_point"].to(computed)
        values = (rows.view(*packed.shape[:-1], head_dim).to(computed) - zero_point) * parts["scale"].to(computed)
        return values.to(dtype)

    def _grid(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [..., head_dim], scale and zero point [..., 1], all in float32 or wider; codes are whole numbers."""
        x = states.to(wide(states.dtype))
        low = x.amin(dim=-1, keepdim=True).clamp(max=0) * self.low
        high = x.amax(dim=-1, keepdim=True).clamp(min=0) * self.high
        steps = 2**self.bits - 1
        if self.symmetric:
            largest = torch.maximum(high, -low)
            scale = torch.where(largest == 0, 1.0, largest / (steps // 2))
            zero_point = torch.full_like(scale, (steps + 1) // 2)
            scale = straight(scale, _stored)
        else:
            empty = (low == 0) & (high == 0)
            low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
            scale = straight((high - low) / steps, _stored)
            zero_point = straight(-low / scale, torch.round).clamp(0, steps)
        codes = (straight(x / scale, torch.round) + zero_point).clamp(0, steps)
        return codes, scale, zero_point


def _stored(scale: Tensor) -> Tensor:
    """As float16 holds it."""
    return scale.clamp(SMALLEST, LARGEST).half().to(scale.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32 at least."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def straight(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of ``x``, exactly, with the gradient of ``x`` itself."""
    result: Tensor = _Straight.apply(x, function) if x.requires_grad else function(x)
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
