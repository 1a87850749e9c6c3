"""KIVI (Liu et al., arXiv 2402.02750, section 3): keys on grids per channel, values on grids per token.

    a grid of b bits for some numbers x:    z = min x    s = (max x - min x) / (2**b - 1)
    q = clamp(round((x - z) / s), 0, 2**b - 1)            read back: q s + z

Keys, behind the rotary embedding, have channels that stand out in every token: the numbers of a grid are those of one
channel in g consecutive tokens. Values have no such channels: the numbers of a grid are g channels of one token.

Keys are encoded R tokens at a time: 0 to R - 1 of the newest stay as they came. Of values always the newest R do, and
older ones are encoded one by one. z and s are rounded to float16 before anything is computed with them.

Kept: codes, packed as in ``formats/packing.py``, and two float16 per grid: b + 32 / g bits per element, 3.0 for b = 2
and g = 32, besides the newest R. The paper reads the prompt in full precision while it is processed; here attention
reads what is stored at all times, so what a perplexity measures is what generating uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.kv.chunks import ChunkStore
from quantkit.kv.interface import LayerFacts, LayerKV
from quantkit.kv.quantiser import LARGEST, SMALLEST, wide


class Config(BaseModel, frozen=True, extra="forbid"):
    bits: Literal[2, 4] = Field(2, description="width of a code")
    group_size: int = Field(
        32, ge=8, multiple_of=8, description="tokens (of keys) or channels (of values) that share one grid"
    )
    residual: int = Field(128, ge=0, description="newest tokens in full precision: of values so many, of keys up to it")

    @model_validator(mode="after")
    def _residual_holds_whole_groups(self) -> Config:
        if self.residual % self.group_size:
            raise ValueError(f"residual {self.residual} is no multiple of group_size {self.group_size}")
        return self

    def describe(self) -> str:
        """In words, behind "keys and values"."""
        return (
            f"{self.bits}-bit codes (KIVI), keys per channel and {self.group_size} tokens, values per token and "
            f"{self.group_size} channels, the newest {self.residual} tokens in full precision"
        )


def layer_kv(config: Config, facts: LayerFacts) -> LayerKV:
    """The same for every layer."""
    return LayerKV(
        Keys(config.bits, config.group_size, config.residual), Values(config.bits, config.group_size, config.residual)
    )


@dataclass(frozen=True)
class Keys:
    """A ``Method`` and a ``ChunkCodec``: a unit is a group of tokens."""

    bits: int
    group: int
    residual: int

    def store(self) -> ChunkStore:
        return ChunkStore(self, unit=self.group, chunk=self.residual or self.group)

    def round(self, states: Tensor) -> Tensor:
        """Gradients go straight through."""
        return self.store().append(states)

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """``codes`` int32 [.., groups, ceil(group * head_dim * bits / 32)], token after token; ``scale`` and ``low``
        float16 [.., groups, head_dim]."""
        grouped = states.unflatten(2, (-1, self.group))  # [batch, heads, groups, group, head_dim]
        codes, scale, low = grid(grouped, self.bits, dim=3)
        rows = pack_rows(codes.flatten(0, 2).flatten(1), self.bits)
        return {"codes": rows.view(*grouped.shape[:3], -1), "scale": scale.squeeze(3), "low": low.squeeze(3)}

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        packed = parts["codes"]
        rows = unpack_rows(packed.flatten(0, 2), self.bits, self.group * head_dim)
        codes = rows.view(*packed.shape[:3], self.group, head_dim)
        return read(codes, parts["scale"].unsqueeze(3), parts["low"].unsqueeze(3), dtype).flatten(2, 3)


@dataclass(frozen=True)
class Values:
    """A ``Method`` and a ``ChunkCodec``: a unit is a token. Where head_dim is no multiple of ``group``, a group is the
    largest divisor of head_dim below it."""

    bits: int
    group: int
    residual: int

    def store(self) -> ChunkStore:
        return ChunkStore(self, unit=1, chunk=1, recent=self.residual)

    def round(self, states: Tensor) -> Tensor:
        """Gradients go straight through."""
        return self.store().append(states)

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """``codes`` int32 [.., tokens, ceil(head_dim * bits / 32)]; ``scale`` and ``low`` float16 [.., tokens,
        head_dim / group]."""
        grouped = states.unflatten(-1, (-1, self._group(states.shape[-1])))
        codes, scale, low = grid(grouped, self.bits, dim=-1)
        rows = pack_rows(codes.reshape(-1, states.shape[-1]), self.bits)
        return {"codes": rows.view(*states.shape[:3], -1), "scale": scale.squeeze(-1), "low": low.squeeze(-1)}

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        packed = parts["codes"]
        rows = unpack_rows(packed.flatten(0, 2), self.bits, head_dim)
        codes = rows.view(*packed.shape[:3], -1, self._group(head_dim))
        return read(codes, parts["scale"].unsqueeze(-1), parts["low"].unsqueeze(-1), dtype).flatten(-2)

    def _group(self, head_dim: int) -> int:
        return next(size for size in range(min(self.group, head_dim), 0, -1) if head_dim % size == 0)


def grid(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 in the shape of ``x``, s and z float16 with length 1 in ``dim``: one grid for all of that dimension.

    NaN among the numbers of a grid makes its s and z NaN, so all of them read back as NaN.
    """
    x = x.to(wide(x.dtype))
    low = x.amin(dim, keepdim=True).clamp(-LARGEST, LARGEST).half()
    z = low.to(x.dtype)
    scale = ((x.amax(dim, keepdim=True) - z) / (2**bits - 1)).clamp(SMALLEST, LARGEST).half()
    codes = torch.round((x - z) / scale.to(x.dtype)).nan_to_num(0).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


def read(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """q s + z in ``dtype``."""
    computed = wide(dtype)
    return (codes.to(computed) * scale.to(computed) + low.to(computed)).to(dtype)
