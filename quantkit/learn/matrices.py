"""Square matrices that are learned and can be undone, and where they start.

    direct    P itself; P**-T by one LU factorisation in float64 for every step
    svd       P = S @ Cay(A) @ diag(exp(th)) @ Cay(B).T        Cay(A) = (I - A / 2)**-1 @ (I + A / 2), orthogonal
              P**-T: the same with -th

S is the start, orthogonal; A and B are skew and 0 at the start, and so is th, which stays within +-ln(100) / 2: no
direction is ever stretched more than 100 times as much as another. This is FlatQuant's form (Sun et al., arXiv
2410.09426, section 3.1), but for its U and V, which start at Cay(A) of a random A instead of being turned from S.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.online import apply
from quantkit.learn.functional import transposed_inverse

Parameterisation = Literal["direct", "svd"]
Start = Literal["hadamard", "haar", "cayley"]
_LARGEST_LOG = math.log(100) / 2
"""Bound of |th|."""


class Matrix(nn.Module):
    """P [heads, n, n]; a single matrix is that of one head."""

    def __init__(self, start: Tensor, parameterisation: Parameterisation) -> None:
        """
        Args:
            start: [heads, n, n] float32, orthogonal.
        """
        super().__init__()
        self.start: Tensor
        """S"""
        self.register_buffer("start", start)
        self.entries = nn.Parameter(start.clone()) if parameterisation == "direct" else None
        if self.entries is None:
            self.turns = nn.Parameter(torch.zeros(2, *start.shape))
            """Below the diagonal: A and B."""
            self.stretch = nn.Parameter(torch.zeros(start.shape[:-1]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P**-T), [heads, n, n] each; P**-T is NaN where there is none."""
        if self.entries is not None:
            return self.entries, transposed_inverse(self.entries.double()).to(self.entries.dtype)
        first, last = cayley(self.turns)
        left, right = self.start @ first, last.mT
        logs = _LARGEST_LOG * (self.stretch / _LARGEST_LOG).tanh()
        return left * logs.exp()[..., None, :] @ right, left * logs.neg().exp()[..., None, :] @ right


def cayley(entries: Tensor) -> Tensor:
    """Orthogonal [..., n, n]: Cay(A), A = L - L.T of the strict lower triangle L of ``entries``."""
    lower = entries.tril(-1)
    half = (lower - lower.mT) / 2
    one = torch.eye(entries.shape[-1], dtype=entries.dtype)
    turned: Tensor = torch.linalg.solve(one - half, one + half)
    return turned


def start_matrix(kind: Start, size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal float32 [size, size].

    Args:
        kind: hadamard: a Hadamard matrix behind random signs, or where none is known a Hartley matrix; haar: uniformly
            distributed; cayley: the authors' start, Cay(A) @ Cay(B).T with A and B from such matrices, half mixed.
    """
    if kind == "hadamard":
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
        return apply(torch.eye(size, dtype=torch.float64), LayerInputs(signs=signs)).float()
    if kind == "haar":
        return _haar(size, generator).float()
    first, last = (cayley(_haar(size, generator)) for _ in range(2))
    return (first @ last.mT).float()


def _haar(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
