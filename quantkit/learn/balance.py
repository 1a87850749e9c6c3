"""Where the matrices of an input start, in closed form: where the errors of inputs and of weights are least together.

If rounding adds noise in proportion to the mean square of what is rounded, that of the output is in proportion to

    E |P @ x|**2 * sum |W @ P**-1|**2        P.T = left (x) right

whatever rotation comes last. With x read as V [a, b], G = left @ left.T and the same of right, H,

    A = E[V @ H @ V.T]        B = sum over rows of W of V @ H**-1 @ V.T        [a, a]

it is tr(G @ A) * tr(G**-1 @ B), least for the geometric mean A**-1 # B (FlatQuant's c, as smoothing by root mean
squares, is its diagonal case). Left and right take turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TURNS = 4
_CHUNK = 1 << 22
"""Numbers in float64 at a time: 34 MB."""
_DAMPING = 1e-3
"""Of the mean of the diagonal, added to it: directions that hardly occur are not blown up."""


def balanced_roots(inputs: Tensor, weights: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Symmetric float64 roots of G [left, left] and H [right, right], each of determinant 1.

    Args:
        inputs: [tokens, left * right].
        weights: [rows, left * right], of all linears that read them.
    """
    x, w = (matrix.view(len(matrix), left, -1) for matrix in (inputs, weights))
    g, h = (torch.eye(size, dtype=torch.float64) for size in x.shape[1:])
    for _ in range(_TURNS):
        g = _mean(_second(x, h), _second(w, torch.linalg.inv(h)))
        h = _mean(_second(x.mT, g), _second(w.mT, torch.linalg.inv(g)))
    return _power(g, 0.5), _power(h, 0.5)


def _second(values: Tensor, metric: Tensor) -> Tensor:
    """Sum of V @ metric @ V.T, float64, damped; ``values`` [rows, a, b]."""
    total = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
    for part in values.split(max(1, _CHUNK // values[0].numel())):
        wide = part.double()
        total += (wide @ metric).transpose(0, 1).flatten(1) @ wide.transpose(0, 1).flatten(1).mT
    total = (total + total.mT) / 2
    return total + torch.eye(len(total), dtype=total.dtype) * (_DAMPING * total.diagonal().mean())


def _mean(a: Tensor, b: Tensor) -> Tensor:
    """a**-1 # b, of determinant 1."""
    root, undo = _power(a, 0.5), _power(a, -0.5)
    mean = undo @ _power(root @ b @ root, 0.5) @ undo
    return mean / torch.linalg.slogdet(mean).logabsdet.div(len(mean)).exp()


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp(min=torch.finfo(torch.float64).tiny) ** exponent @ vectors.mT
