"""One decoder block as the stages see it: named tensors, its linears, and the sites between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearInfo:
    """A weight matrix of a block that methods may quantise; experts of a mixture appear one by one."""

    name: str
    """Module path inside the block, for example ``self_attn.q_proj`` or ``mlp.experts.3.down_proj``."""
    out_features: int
    in_features: int
    has_bias: bool


@dataclass(frozen=True)
class Site:
    """A place where activations can be transformed: a producer and every consumer of what it produces.

    Dividing the consumers' input columns by t and multiplying what the producer emits by t leaves the function as it
    is.
    """

    name: str
    """Path-like, unique in the block: ``attention.input``, ``attention.value``, ``mlp.input``, ``mlp.hidden``,
    and for experts ``mlp.experts.3.hidden``."""
    kind: Literal["norm", "linear"]
    producer: str
    """Module path inside the block: a norm, or a linear whose output reaches the consumers unchanged in scale."""
    consumers: tuple[str, ...]
    """Every module that reads the signal, also those that are never quantised (routers, shared-expert gates)."""
    rows: Tensor | None = None
    """kind linear: indices [signal width] of the producer's output rows that carry the signal, in the order of the
    signal; None: all rows in order. For fused qkv or gate_up projections."""
    norm_offset: float = 0.0
    """kind norm: the norm multiplies by (norm_offset + weight); 1.0 for Gemma."""
    repeats: int = 1
    """v -> o with grouped heads: each group of ``head_dim`` signal columns is read by this many query heads in a row
    (consumer columns = [kv_heads, repeats, head_dim], signal = [kv_heads, head_dim])."""
    head_dim: int = 0
    """Set when ``repeats`` > 1 or the site is a v -> o site; 0 otherwise."""


@dataclass
class Block:
    """Block ``index`` of a model with its tensors in memory. Methods read it; ``transforms/fold.py`` writes it."""

    index: int
    prefix: str
    """Module path of the block in the model with a trailing dot: ``model.layers.3.``"""
    tensors: dict[str, Tensor]
    """Local tensor name (``self_attn.q_proj.weight``) -> float32 working copy (integer tensors stay as they are)."""
    stored_dtypes: dict[str, torch.dtype]
    """Local tensor name -> dtype it had in the source."""
    linears: tuple[LinearInfo, ...]
    sites: tuple[Site, ...]

    def weight(self, linear: str) -> Tensor:
        """float32 [out_features, in_features]."""
        return self.tensors[f"{linear}.weight"]
