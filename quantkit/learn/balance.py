"""Where the matrices of an input start, in closed form: where the errors of inputs and of weights are least together.

If rounding adds noise in proportion to the mean square of what is rounded, that of the output is in proportion to

    E |P @ x|**2 * sum |W @ P**-1|**2        P.T = left (x) right

whatever rotation comes last. With x read as V [a, b], G = left @ left.T and the same of right, H,

    A = E[V @ H @ V.T]        B = sum over rows of W of V @ H**-1 @ V.T        [a, a]

it is tr(G @ A) * tr(G**-1 @ B), least for the geometric mean A**-1 # B (FlatQuant's c, as smoothing by root mean
squares, is its diagonal case). Left and right take turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TURNS = 4
_CHUNK = 1 << 22
"""Numbers in float64 at a time: 34 MB."""
_DAMPING = 1e-3
"""Of the mean of the diagonal, added to it: directions that hardly occur are not blown up."""


Scaled = tuple[Tensor, Tensor | float]
"""A matrix of rows, and what its columns are divided by."""


def balanced_roots(inputs: Sequence[Scaled], weights: Sequence[Scaled], left: int) -> tuple[Tensor, Tensor]:
    """Symmetric float64 roots of G [left, left] and H [right, right], each of determinant 1.

    Args:
        inputs: matrices [tokens, left * right].
        weights: matrices [rows, left * right], of all linears that read the inputs.
    """
    right = inputs[0][0].shape[1] // left
    g, h = (torch.eye(size, dtype=torch.float64) for size in (left, right))
    for _ in range(_TURNS):
        g = _mean(_second(inputs, h, left), _second(weights, torch.linalg.inv(h), left))
        h = _mean(_second(inputs, g, left, right=True), _second(weights, torch.linalg.inv(g), left, right=True))
    return _power(g, 0.5), _power(h, 0.5)


def _second(matrices: Sequence[Scaled], metric: Tensor, left: int, right: bool = False) -> Tensor:
    """Sum of V @ metric @ V.T, float64, damped, for every row V [left, -1]; ``right``: for its transpose."""
    total: Tensor | float = 0.0
    for matrix, scale in matrices:
        for part in matrix.split(max(1, _CHUNK // matrix.shape[1])):
            rows = (part / scale).double().view(len(part), left, -1)
            rows = rows.mT if right else rows
            total = total + (rows @ metric).transpose(0, 1).flatten(1) @ rows.transpose(0, 1).flatten(1).mT
    total = torch.as_tensor(total)
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
