"""Matrices in front of the quantiser of keys."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online
from quantkit.kernels.triton import heads


class _Turn:
    """Keys by a matrix, on a GPU through a kernel where no gradient is asked for."""

    def __init__(self) -> None:
        self._made: dict[Any, heads.Matrix] = {}

    def __call__(self, keys: Tensor, inputs: LayerInputs, turn: Callable[[Tensor, LayerInputs], Tensor]) -> Tensor:
        """``turn``, which is ``online.apply`` or ``online.restore``, of ``keys`` [..., head_dim] and ``inputs``."""
        learned = inputs.matrix is not None and inputs.matrix.requires_grad
        if not heads.turns(keys) or (torch.is_grad_enabled() and (keys.requires_grad or learned)):
            return turn(keys, inputs)
        where = turn, keys.shape[-1], keys.dtype, keys.device
        if where not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                rows = turn(torch.eye(keys.shape[-1], dtype=torch.float64, device=keys.device), inputs)
            # Without the factor a Hadamard matrix is +-1, which any dtype holds.
            factor = 1.0 if inputs.signs is None else keys.shape[-1] ** -0.5
            self._made[where] = heads.matrix_of(rows, keys.dtype, factor)
        return heads.multiply(keys, self._made[where])

    def tensors(self) -> Iterable[Tensor]:
        """What was made of matrices."""
        return [part for made in self._made.values() for part in (made.high, made.low) if part is not None]


class RandomHadamard:
    """k M = H @ (signs * k) / sqrt(head_dim), as ``kernels/online.py`` has it; R3 of QuaRot, for any head_dim.

    The signs keep a key that looks like a row of H (a constant one, say) from ending up in one channel.
    """

    def __init__(self, seed: str) -> None:
        """
        Args:
            seed: what the signs are drawn from; the same ones on every machine and with every version of PyTorch.
        """
        self._seed = seed
        self._turn = _Turn()
        self._inputs: dict[tuple[int, torch.device], LayerInputs] = {}

    def apply(self, keys: Tensor) -> Tensor:
        return self._turn(keys, self._signs(keys), online.apply)

    def undo(self, keys: Tensor) -> Tensor:
        return self._turn(keys, self._signs(keys), online.restore)  # k M**-1 is k M.T: M is orthogonal

    def tensors(self) -> Iterable[Tensor]:
        signs = [inputs.signs for inputs in self._inputs.values() if inputs.signs is not None]
        return [*signs, *self._turn.tensors()]

    def _signs(self, keys: Tensor) -> LayerInputs:
        known = self._inputs.get((keys.shape[-1], keys.device))
        if known is None:
            draw = random.Random(self._seed)
            signs = [1 if draw.random() < 0.5 else -1 for _ in range(keys.shape[-1])]
            with torch.inference_mode(False):  # gradients are taken through products with them
                known = LayerInputs(signs=torch.tensor(signs, dtype=torch.int8, device=keys.device))
            self._inputs[keys.shape[-1], keys.device] = known
        return known


class KeyMatrix:
    """k M for a dense, invertible M: a learned one (P_k of FlatQuant)."""

    def __init__(self, matrix: Tensor, inverse: Tensor | None = None) -> None:
        """
        Args:
            matrix: M [head_dim, head_dim]; while it is learned, make a new object for each step.
            inverse: M**-T, if it is known.

        Raises:
            torch.linalg.LinAlgError: M is singular.
        """
        self._turn = _Turn()
        self._inputs = LayerInputs(matrix=matrix)
        self._inverse = online.inverse(self._inputs) if inverse is None else LayerInputs(matrix=inverse)

    def apply(self, keys: Tensor) -> Tensor:
        return self._turn(keys, self._inputs, online.apply)

    def undo(self, keys: Tensor) -> Tensor:
        return self._turn(keys, self._inverse, online.restore)

    def tensors(self) -> Iterable[Tensor]:
        matrices = [m for m in (self._inputs.matrix, self._inverse.matrix) if m is not None]
        return [*matrices, *self._turn.tensors()]
