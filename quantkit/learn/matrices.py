"""Square matrices that are learned and can be undone, and where they start.

    direct    P itself; P**-T by one LU factorisation in float64 for every step
    svd       P = U @ Cay(A) @ diag(exp(th)) @ Cay(B).T @ V        Cay(A) = (I - A / 2)**-1 @ (I + A / 2), orthogonal
              P**-T: the same with -th

U and V are orthogonal and stay; A and B are skew and 0 at the start. No direction is ever stretched more than 100 times
as much as another: th stays within +-ln(100) / 2. This is FlatQuant's form (Sun et al., arXiv 2410.09426, section 3.1),
but for its factors, which start at Cay(A) of a random A instead of being turned from where P starts.
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
Start = Literal["balanced", "hadamard", "haar", "cayley"]
_LARGEST_LOG = math.log(100) / 2
"""Bound of |th|."""
_LARGEST_SHARE = 0.9
"""Of this bound, to start with; nearer to it there is hardly a gradient."""


class Matrix(nn.Module):
    """P [heads, n, n]; a single matrix is that of one head."""

    def __init__(self, start: Tensor, parameterisation: Parameterisation, root: Tensor | None = None) -> None:
        """
        Args:
            start: [heads, n, n] float32, orthogonal.
            root: [n, n] float64, symmetric with positive eigenvalues: P starts at root @ start; None: at start.
        """
        super().__init__()
        self.entries: nn.Parameter | None = None
        stretch = torch.zeros(start.shape[:-1])
        if parameterisation == "direct":
            self.entries = nn.Parameter(start.clone() if root is None else (root @ start.double()).float())
            return
        first, last = start, None
        if root is not None:
            values, vectors = torch.linalg.eigh(root)
            first, last = vectors.float(), (vectors.mT @ start.double()).float()
            shares = (values.log() / _LARGEST_LOG).clamp(-_LARGEST_SHARE, _LARGEST_SHARE)
            stretch = (shares.atanh() * _LARGEST_LOG).float().expand(start.shape[:-1]).clone()
        self.first: Tensor
        """U"""
        self.last: Tensor | None
        """V; None: 1."""
        self.register_buffer("first", first)
        self.register_buffer("last", last)
        self.turns = nn.Parameter(torch.zeros(2, *start.shape))
        """Below the diagonal: A and B."""
        self.stretch = nn.Parameter(stretch)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P**-T), [heads, n, n] each; P**-T is NaN where there is none."""
        if self.entries is not None:
            return self.entries, transposed_inverse(self.entries.double()).to(self.entries.dtype)
        first, last = cayley(self.turns)
        left, right = self.first @ first, last.mT if self.last is None else last.mT @ self.last
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
        kind: hadamard, balanced: a Hadamard matrix behind random signs, or where none is known a Hartley matrix; haar:
            uniformly distributed; cayley: the authors' start, Cay(A) @ Cay(B).T with A and B from such matrices, half
            mixed.
    """
    if kind in ("hadamard", "balanced"):
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
        return apply(torch.eye(size, dtype=torch.float64), LayerInputs(signs=signs)).float()
    if kind == "haar":
        return _haar(size, generator).float()
    first, last = (cayley(_haar(size, generator)) for _ in range(2))
    return (first @ last.mT).float()


def _haar(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
