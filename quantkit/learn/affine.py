"""What is learned about a block by ``affinequant``: what ``omniquant`` learns, and matrices that mix channels.

    y = W @ x   becomes   y = (W @ B) @ (B**-1 @ x)        B = diag(1 / t) @ (I + N), N with a zero diagonal

t is the change of the signal that ``changes.py`` learns; B is the transpose of the A of AffineQuant (Ma et al., arXiv
2403.12544). N opens from the diagonal outwards, epoch by epoch (their gradual mask): an entry that is not open is 0
and gets no gradient. It is

    dominant    N = P * min(1, rho / sum_j |P_ij|)    P: learned, rho = 0.9
    masked      N = diag(t) @ P                       so B = diag(1 / t) + P, the authors' matrix

times ``stability`` in either case. With row sums of |N| below 1, I + N is strictly diagonally dominant, so it has an
inverse, and one whose condition number in the maximum norm is at most (1 + rho) / (1 - rho) = 19. The authors' matrices
are dominant only as long as training leaves them so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.formats.layer import LayerInputs
from quantkit.learn.changes import FEWEST_ROWS, BlockChanges
from quantkit.learn.fake_quant import InputRounding
from quantkit.learn.functional import Tensors, fold_matrix, transposed_inverse
from quantkit.learn.loop import Group
from quantkit.models.block import Site
from quantkit.transforms.interface import Lesson, Observed, Situation, Solution

if TYPE_CHECKING:
    from quantkit.transforms.affinequant import Config

_RHO = 0.9
"""Largest sum of |N| over a row."""


def bandwidth(width: int, epoch: int, epochs: int) -> int:
    """B: entries (i, j) with 0 < |i - j| < B are open in ``epoch`` 0 .. epochs - 1; ``width`` in the last one."""
    return width if epochs == 1 else 1 + (width - 1) * epoch // (epochs - 1)


class Mixing(nn.Module):
    """I + N of one signal."""

    def __init__(self, heads: int, width: int, stability: float, dominant: bool) -> None:
        """
        Args:
            heads: matrices, each of a group of ``width`` channels that nothing is mixed into from outside.
            stability: what the learned entries are multiplied by.
            dominant: keep it diagonally dominant; else N is in units of the signal's scale.
        """
        super().__init__()
        self.entries = nn.Parameter(torch.zeros(heads, width, width))
        self._stability = stability
        self._dominant = dominant
        self.open_to(1)

    def open_to(self, band: int) -> None:
        """Let the entries learn that are less than ``band`` away from the diagonal."""
        index = torch.arange(self.entries.shape[-1])
        distance = (index[:, None] - index).abs()
        self._open = (distance > 0) & (distance < band)

    def forward(self, t: Tensor) -> Tensor:
        """I + N [heads, width, width]; ``t`` [heads * width], or [1] for one value: the scale of the signal."""
        entries = self.entries.where(self._open, 0.0) * self._stability
        if self._dominant:
            entries = entries * (_RHO / entries.abs().sum(-1, keepdim=True).clamp(min=_RHO))
        else:
            entries = entries * t.expand(self.entries.shape[:-1].numel()).unflatten(0, (len(entries), -1, 1))
        return entries + torch.eye(entries.shape[-1], dtype=entries.dtype)


class AffineChanges(BlockChanges):
    """Everything that is learned about a block."""

    def __init__(self, situation: Situation, config: Config, observed: Observed, lesson: Lesson) -> None:
        super().__init__(situation, config, observed, lesson)
        self._lr, self._opening = config.lr_matrix, config.opening
        stability = config.stability_of(situation.scheme.activations is not None)
        dominant = config.parameterisation == "dominant"
        # What an earlier transform does to their input at run time stands between the values and the weight.
        touched = {name for name in situation.linears if lesson.module.get_submodule(name)._forward_pre_hooks}
        self._mixings: dict[str, Mixing] = {}
        self._online: dict[str, InputRounding] = {}  # site -> what is done at run time; the other sites are folded
        for site in situation.block.sites if stability else ():
            readers = [name for name in site.consumers if name in situation.linears]
            if not readers or len(self._statistics.of_site(site).rows) < FEWEST_ROWS:
                continue
            width = self._base[f"{readers[0]}.weight"].shape[1]
            if config.mixes_values(site, situation.linears) and not touched.intersection(readers):
                heads = width // site.repeats // site.head_dim
                self._mixings[site.name] = Mixing(heads, site.head_dim, stability, dominant)
            elif config.mixes_inputs(site):
                self._mixings[site.name] = Mixing(1, width, stability, dominant)
                hook = self._online[site.name] = InputRounding(situation.scheme.activations)
                self.inputs |= dict.fromkeys(site.consumers, hook)

    def groups(self) -> list[Group]:
        return [*super().groups(), Group("matrix", [mixing.entries for mixing in self._mixings.values()], self._lr)]

    def begin_epoch(self, epoch: int, epochs: int) -> bool:
        """Open the next band; every entry is open behind the share ``opening`` of the epochs."""
        last = max(1, round(self._opening * epochs))
        epoch = min(epoch, last - 1)
        for mixing in self._mixings.values():
            mixing.open_to(bandwidth(mixing.entries.shape[-1], epoch, last))
        return epoch == last - 1

    def plain_tensors(self) -> Tensors:
        for hook in self._online.values():
            hook.op = LayerInputs()
        return super().plain_tensors()

    def solution(self, fact: Mapping[str, Any]) -> Solution:
        found = super().solution(fact)
        matrices: dict[str, Tensor] = {}
        ops: dict[str, LayerInputs] = {}
        facts: list[dict[str, Any]] = []
        for site, undo in self._undoings():
            matrix = transposed_inverse(undo.detach().double())
            facts.append({"site": site.name, **_soundness(undo.detach().double(), matrix)})
            if site.name in self._online:
                readers = [name for name in site.consumers if name in self._situation.linears]
                ops |= dict.fromkeys(readers, LayerInputs(matrix=matrix[0]))
            else:
                matrices[site.name] = matrix
        return replace(found, matrices=matrices, ops=ops, facts=[*found.facts, *facts])

    def _undoings(self) -> list[tuple[Site, Tensor]]:
        """Every site that is mixed, with its I + N."""
        sites = [site for site in self._situation.block.sites if site.name in self._mixings]
        return [(site, self._mixings[site.name](self._scale(site))) for site in sites]

    def _scale(self, site: Site) -> Tensor:
        change = self._changes.get(site.name)
        return torch.ones(1) if change is None else change.values()[0]

    def _folded(self) -> Tensors:
        tensors = super()._folded()
        for site, undo in self._undoings():
            matrix = transposed_inverse(undo)
            if site.name not in self._online:
                fold_matrix(tensors, site, matrix, undo)
                continue
            self._online[site.name].op = LayerInputs(matrix=matrix[0])
            for name in site.consumers:
                if name in self._situation.linears:
                    tensors[f"{name}.weight"] = tensors[f"{name}.weight"] @ undo[0]
        return tensors


def _soundness(undo: Tensor, matrix: Tensor) -> dict[str, float | None]:
    """How far I + N is from having no inverse, of the worst head: ``dominance`` min_i(1 - sum_j |N_ij|), above 0 where
    it is dominant, and the condition number in the maximum norm; None: it is not finite."""
    excess = undo.abs().sum(-1) - undo.diagonal(dim1=-2, dim2=-1).abs()
    condition = (undo.abs().sum(-1).amax(-1) * matrix.abs().sum(-2).amax(-1)).max()
    found = {"dominance": float(1 - excess.max()), "condition": float(condition)}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
