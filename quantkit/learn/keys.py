"""What is learned about the keys and values of an attention whose cache is quantised (FlatQuant, Sun et al., arXiv
2410.09426, sections 3.2 and 4.1).

    keys, behind the rotary embedding:   Q(k P) P**-1        P [head_dim, head_dim], the same for all heads
    values:                              Q(v)

with learned shares of the lower and upper end of the range of every token and head in both Q. P takes the place of the
Hadamard matrix that keys would be rotated by; keys that would not be rotated have none. Queries stay as they are: a
cache returns keys multiplied by P**-1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.kv import KVFormat, LearnedKV
from quantkit.kv.attach import KVHook, attentions, key_dim, kv_hooks
from quantkit.kv.interface import LayerKV
from quantkit.kv.quantiser import MinMax
from quantkit.kv.rotation import KeyMatrix
from quantkit.learn.fake_quant import LARGEST_START
from quantkit.learn.matrices import Matrix

_SHARES = tuple(1 - step / 20 for step in range(11))
"""Of a range, tried as a start: 1, 0.95 .. 0.5."""
_ROWS = 512
"""Tokens that they are judged by."""


class KeysAndValues:
    """The parameters of one attention."""

    def __init__(self, path: str, hook: KVHook, dim: int, make: Callable[[int], Matrix]) -> None:
        """
        Args:
            path: of the attention in its block.
            hook: in front of it.
            dim: numbers in a key of one head.
            make: a matrix [1, n, n] to start with, for n.
        """
        self.path = path
        self._hook, self._dim = hook, dim
        self.matrix = make(dim) if hook.learnable.key_transform == "dense" else None
        """P [1, dim, dim]"""
        start = min(hook.learnable.clip, LARGEST_START)
        self.shares = nn.Parameter(torch.full((2, 2), start).logit())
        """Logits [keys and values, lower and upper end]."""

    def start_shares(self, share: float) -> None:
        """Put the shares where they suit what is normally distributed, as rotated keys are, or a ``share`` of the way
        there."""
        kv = self._hook.learnable
        kept = kv.clip * (1 - share * (1 - _likely_share(kv, self._dim)))
        with torch.no_grad():
            self.shares.copy_(torch.full((2, 2), kept).clamp(max=LARGEST_START).logit())

    def use(self) -> None:
        """Make the attention round by the parameters as they are, with gradients."""
        kv, (keys, values) = self._hook.learnable, self.shares.sigmoid()
        transform = None
        if self.matrix is not None:
            matrix, undo = self.matrix()
            transform = KeyMatrix(matrix[0], undo[0])
        methods = [MinMax(kv.bits, kv.symmetric, *clip.unbind()) for clip in (keys, values)]
        self._hook.trial = LayerKV(methods[0], methods[1], transform)

    def leave(self) -> None:
        """Make it round by what it holds."""
        self._hook.trial = None

    @torch.no_grad()
    def learned(self) -> LearnedKV:
        keys, values = self.shares.sigmoid()
        matrix = None if self.matrix is None else self.matrix()[0][0].detach().clone()
        return LearnedKV(keys.clone(), values.clone(), matrix)

    def facts(self) -> dict[str, Any]:
        """Condition number of the matrix, and the shares of ranges that are kept."""
        held = self.learned()
        facts: dict[str, Any] = {"clip_keys": held.key_clip.tolist(), "clip_values": held.value_clip.tolist()}
        if held.key_matrix is not None:
            facts["condition_keys"] = float(torch.linalg.cond(held.key_matrix))
        return facts


def caches_of(block: nn.Module, matrices_of: Callable[[str], Callable[[int], Matrix]]) -> list[KeysAndValues]:
    """Of every attention of ``block``, which keeps keys and values quantised.

    Args:
        matrices_of: a name -> ``make``.
    """
    hooks = kv_hooks(block)
    return [
        KeysAndValues(one.path, hooks[one.path], key_dim(one.module), matrices_of(f"{one.path} keys"))
        for one in attentions(block)
    ]


def _likely_share(kv: KVFormat, dim: int) -> float:
    """Share of both ends of the range with the least squared error of rows of ``dim`` normally distributed numbers."""
    rows = torch.randn(_ROWS, dim, generator=torch.Generator().manual_seed(0))

    def error(share: float) -> float:
        wrong: Tensor = MinMax(kv.bits, kv.symmetric, share, share).round(rows) - rows
        return float(wrong.square().sum(dtype=torch.float64))

    return min(_SHARES, key=error)
