"""The matrix that the input of a linear is multiplied by at run time: ``op`` in round(op(x * scale + shift)).

    hadamard     M = H @ diag(signs) / sqrt(n)     H: ``hadamard.py``
    kronecker    M = (left (x) right).T            v, read as V [a, b], becomes left.T @ V @ right
    dense        M = matrix.T                      v becomes v @ matrix

A weight W that is to meet M @ v instead of v becomes W @ M**-1, its rows w M**-T @ w: W @ v stays what it was.
``apply`` specifies what a kernel has to compute: in float32 at least, whatever the dtype of x, and rounded once at the
end. In 16 bits the sums over the whole width of a token would lose digits, and in float16 they would overflow.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from quantkit.formats.layer import LayerFormat, LayerInputs
from quantkit.kernels import hadamard


def apply(x: Tensor, inputs: LayerInputs) -> Tensor:
    """M @ v for every vector v of ``x`` [..., n], in the dtype of ``x``; ``x`` itself where there is no op."""
    if inputs.op == "none":
        return x
    wide = _wide(x)
    if inputs.signs is not None:
        y = hadamard.multiply(wide * inputs.signs.to(wide.dtype)) * wide.shape[-1] ** -0.5
    elif inputs.matrix is not None:
        y = wide @ inputs.matrix.to(wide.dtype)
    else:
        left, right = _factors(inputs, wide.dtype)
        y = _sandwich(left.mT, wide, right)
    return y.to(x.dtype)


def inverse(inputs: LayerInputs) -> LayerInputs:
    """The op of M**-T, float64: ``apply`` of it to the rows of a weight gives what has to meet M @ v.

    Raises:
        torch.linalg.LinAlgError: M is singular.
    """
    if inputs.op == "hadamard":  # M is orthogonal
        return LayerInputs(signs=inputs.signs)
    if inputs.matrix is not None:
        return LayerInputs(matrix=torch.linalg.inv(inputs.matrix.double()).mT)
    left, right = _factors(inputs, torch.float64)
    return LayerInputs(left=torch.linalg.inv(left).mT, right=torch.linalg.inv(right).mT)


def restore(weight: Tensor, inputs: LayerInputs) -> Tensor:
    """``weight`` [rows, n] @ M, in its dtype: the weight that meets v itself."""
    wide = _wide(weight)
    if inputs.signs is not None:
        y = hadamard.multiply(wide, transpose=True) * wide.shape[-1] ** -0.5 * inputs.signs.to(wide.dtype)
    elif inputs.matrix is not None:
        y = wide @ inputs.matrix.to(wide.dtype).mT
    elif inputs.left is not None:
        left, right = _factors(inputs, wide.dtype)
        y = _sandwich(left, wide, right.mT)
    else:
        return weight
    return y.to(weight.dtype)


def operations(layer: LayerFormat, in_features: int) -> int:
    """Multiplications and additions per token that ``apply`` costs; the product with the weight has 2 * rows * n."""
    if layer.input_op == "hadamard":
        return hadamard.split(in_features).operations + 2 * in_features
    if layer.input_op == "kronecker":
        left = layer.input_left or 1
        return 2 * in_features * (left + in_features // left)
    return 2 * in_features**2 if layer.input_op == "dense" else 0


def kronecker_split(size: int) -> tuple[int, int]:
    """(a, b) with a * b = ``size``, a <= b: the least a + b, or one of multiples of 16 that is up to 1.25 times that.

    A prime gives (1, size).
    """
    pairs = [(a, size // a) for a in range(1, isqrt(size) + 1) if size % a == 0]
    least = sum(pairs[-1])
    tiles = [pair for pair in pairs if not (pair[0] % 16 or pair[1] % 16) and sum(pair) <= 1.25 * least]
    return (tiles or pairs)[-1]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _factors(inputs: LayerInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert inputs.left is not None
    assert inputs.right is not None
    return inputs.left.to(dtype), inputs.right.to(dtype)


def _sandwich(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """left @ V @ right for V [a, b] from the last dimension of ``x``."""
    halves = (x.reshape(-1, len(right)) @ right).view(-1, len(left), len(right))
    # ``left @ halves`` would copy ``halves`` and its result to make one product of all.
    return torch.bmm(left.expand(len(halves), -1, -1), halves).view(x.shape)
