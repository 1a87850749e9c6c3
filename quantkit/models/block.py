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
    is. What else can be moved between the two: ``transforms/fold.py``.
    """

    name: str
    """Path-like, unique in the block: ``attention.input``, ``attention.value``, ``mlp.input``, ``mlp.hidden``,
    and for experts ``mlp.experts.3.hidden``."""
    kind: Literal["norm", "linear", "none"]
    """none: what the consumers read cannot be changed before them, because something else reads it, too (the residual
    of a post-norm block). A change of it stays with each consumer: x * t + c in front of the linear."""
    producer: str
    """Module path inside the block: a norm, or a linear whose output reaches the consumers unchanged in scale. Empty
    for kind none."""
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


@dataclass(frozen=True)
class QueryKey:
    """Where queries and keys can be scaled against each other: scores are q @ k, the same for q * s and k / s.

    Channels that cannot be scaled apart share a value of t [width]: the two that a rotary embedding turns into each
    other, the query heads that read one key head, and, behind a norm of queries and keys, all heads. Key channel c is
    divided by ``t[tie[c]]``.
    """

    kind: Literal["linear", "norm"]
    query: str
    """Module path inside the block: the linear that makes the queries, or the norm behind it."""
    key: str
    """The same for the keys; may be the same module."""
    tie: Tensor
    """int64 [key channels], 0 .. width - 1: which value of t a channel of the key has. Channels are [kv_heads,
    head_dim]; kind norm: [head_dim]."""
    head_dim: int
    repeats: int = 1
    """kind linear: query heads in a row that read one key head; queries are [kv_heads, repeats, head_dim]."""
    query_rows: Tensor | None = None
    """kind linear: indices [query channels] of the rows of ``query`` that make the queries; None: all in order."""
    key_rows: Tensor | None = None
    """Indices [key channels] of the rows of ``key``."""
    norm_offset: float = 0.0
    """kind norm: the norm multiplies by (norm_offset + weight)."""

    @property
    def width(self) -> int:
        """Values in t. Per key head: head_dim without rotary embedding, else one per rotated pair and one per channel
        that is not rotated; kind norm: that many in all."""
        return int(self.tie.max()) + 1


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
    query_key: QueryKey | None = None
    """None: not known for this architecture."""

    def weight(self, linear: str) -> Tensor:
        """float32 [out_features, in_features]."""
        return self.tensors[f"{linear}.weight"]
