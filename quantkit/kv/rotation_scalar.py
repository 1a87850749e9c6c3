"""A random rotation, then the best scalar quantiser for what it leaves: TurboQuant without its sketch of the residual
(Zandieh et al., arXiv 2504.19874, section 3.1), the scalar case of HIGGS (arXiv 2411.17525), and EDEN (arXiv
2108.08842).

    n = |x| / sqrt(d)    y = R x / n    q_j = the level nearest to y_j    read back: g R.T q

for one token and head x [d]. R is a Hadamard matrix with random signs: whatever x is, the numbers of y are close to
normally distributed, and the levels are the ones with the least squared error for that (Lloyd-Max). The gain

    g = n <y, y> / <y, q>    unbiased: the error is orthogonal to x, so <x, read> = <x, x>
    g = n <y, q> / <q, q>    mse: the least squared error, at the price of shrunken products

is all that is kept beside the codes, in float16: b + 16 / d bits per element, 2.125 for b = 2 and d = 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.kv.interface import LayerFacts, LayerKV
from quantkit.kv.quantiser import LARGEST, TokenStore, straight, wide
from quantkit.kv.rotation import RandomHadamard

_POSITIVE_LEVELS = {
    1: (0.797885,),
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
"""Bits -> the upper half of the levels for N(0, 1); the lower half mirrors it (Max, 1960, table I)."""
_BLIND = 1e-4
"""Share of <y, y> below which <y, q> says nothing."""


class Config(BaseModel, frozen=True, extra="forbid"):
    bits: Literal[1, 2, 3, 4] = Field(2, description="width of a code")
    gain: Literal["unbiased", "mse"] = Field(
        "unbiased", description="length of what is read: products with it right on average, or the least squared error"
    )
    seed: int = Field(0, ge=0, description="of the signs of the rotations")

    def describe(self) -> str:
        """In words, behind "keys and values"."""
        return (
            f"{self.bits}-bit codes on the levels for normal numbers, rotated, a gain ({self.gain}) per token and head"
        )


def layer_kv(config: Config, facts: LayerFacts) -> LayerKV:
    """Every layer, and its keys and its values, with signs of their own."""
    seed = f"{config.seed} {facts.layer}"
    keys, values = RandomHadamard(f"{seed} keys"), RandomHadamard(f"{seed} values")
    return LayerKV(Rotated(config.bits, config.gain, keys), Rotated(config.bits, config.gain, values))


@dataclass(frozen=True)
class Rotated:
    """A ``Method`` and a ``TokenCodec``."""

    bits: int
    gain: Literal["unbiased", "mse"]
    rotation: RandomHadamard

    def store(self) -> TokenStore:
        return TokenStore(self, self.rotation.tensors)

    def round(self, states: Tensor) -> Tensor:
        """Gradients go straight through."""
        return straight(states, lambda x: self.decode(self.encode(x), x.shape[-1], x.dtype))

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """``codes`` int32 [.., tokens, ceil(head_dim * bits / 32)] and ``gain`` float16 [.., tokens, 1]."""
        x = states.to(wide(states.dtype))
        norm = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y = self.rotation.apply(x / torch.where(norm == 0, 1.0, norm))
        levels = _levels(self.bits, y.dtype, y.device)
        codes = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)
        q = levels[codes]
        along, length = (y * q).sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
        share = length / along if self.gain == "unbiased" else along / q.square().sum(-1, keepdim=True)
        share = torch.where(along <= _BLIND * length, 1.0, share)
        rows = pack_rows(codes.to(torch.uint8).reshape(-1, x.shape[-1]), self.bits)
        return {"codes": rows.view(*states.shape[:-1], -1), "gain": (norm * share).clamp(max=LARGEST).half()}

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        packed, computed = parts["codes"], wide(dtype)
        codes = unpack_rows(packed.reshape(-1, packed.shape[-1]), self.bits, head_dim)
        q = _levels(self.bits, computed, packed.device)[codes.view(*packed.shape[:-1], head_dim).int()]
        return (self.rotation.undo(q) * parts["gain"].to(computed)).to(dtype)


@lru_cache(maxsize=16)
def _levels(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2**bits], ascending."""
    upper = _POSITIVE_LEVELS[bits]
    with torch.inference_mode(False):  # used in training as well
        return torch.tensor([*(-level for level in reversed(upper)), *upper], dtype=dtype, device=device)
