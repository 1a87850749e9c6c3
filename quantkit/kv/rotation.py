"""Matrices in front of the quantiser of keys."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online


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
        self._inputs: dict[tuple[int, torch.device], LayerInputs] = {}

    def apply(self, keys: Tensor) -> Tensor:
        return online.apply(keys, self._signs(keys))

    def undo(self, keys: Tensor) -> Tensor:
        return online.restore(keys, self._signs(keys))  # k M**-1 is k M.T: M is orthogonal

    def tensors(self) -> Iterable[Tensor]:
        return [inputs.signs for inputs in self._inputs.values() if inputs.signs is not None]

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
        self._inputs = LayerInputs(matrix=matrix)
        self._inverse = online.inverse(self._inputs) if inverse is None else LayerInputs(matrix=inverse)

    def apply(self, keys: Tensor) -> Tensor:
        return online.apply(keys, self._inputs)

    def undo(self, keys: Tensor) -> Tensor:
        return online.restore(keys, self._inverse)

    def tensors(self) -> Iterable[Tensor]:
        return [m for m in (self._inputs.matrix, self._inverse.matrix) if m is not None]
