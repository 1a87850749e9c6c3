"""Inputs of a block that ``flatquant`` treats as one, and what is learned about each of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online
from quantkit.learn.changes import Change
from quantkit.learn.fake_quant import InputRounding
from quantkit.learn.matrices import Matrix
from quantkit.models.block import Site

_EXPERT = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """Inputs that have a matrix and limits in common: one signal, or those of all experts of a block."""

    label: str
    sites: tuple[Site, ...]
    """Whose signals they are; of an input that no site names, one of kind none."""
    linears: tuple[str, ...]
    """The quantised ones that read them."""


def places(sites: Iterable[Site], linears: Collection[str]) -> list[Place]:
    """Every input of ``linears``, the quantised ones of a block, in a place."""
    found: dict[str, list[Site]] = {}
    covered: set[str] = set()
    for site in sites:
        covered.update(site.consumers)
        label = "attention.output" if site.head_dim else _EXPERT.sub(".*", site.name)
        if any(name in linears for name in site.consumers):
            found.setdefault(label, []).append(site)
    for name in sorted(set(linears) - covered):
        found[name] = [Site(name, "none", "", (name,))]
    return [
        Place(label, tuple(own), tuple(name for site in own for name in site.consumers if name in linears))
        for label, own in found.items()
    ]


@dataclass
class PlaceParameters:
    """What is learned about one place."""

    place: Place
    hook: InputRounding
    changes: list[Change] = field(default_factory=list)
    """c of the sites that have one."""
    left: Matrix | None = None
    """[1, a, a]; None: there is no matrix."""
    right: Matrix | None = None
    """[1, b, b]; None: the identity, where ``value`` does all that can be done within heads."""
    value: Matrix | None = None
    """[kv_heads, head_dim, head_dim], folded into v and o."""
    shares: nn.Parameter | None = None
    """Logits [2] of the shares of the lower and upper end of ranges that are kept."""
    right_width: int = 0
    """b"""

    def ops(self) -> tuple[LayerInputs, LayerInputs]:
        """The matrix at run time, and the one that rows of weights are multiplied by instead."""
        if self.left is None:
            return LayerInputs(), LayerInputs()
        left, undo_left = self.left()
        one = torch.eye(self.right_width)[None]
        right, undo_right = (one, one) if self.right is None else self.right()
        return LayerInputs(left=left[0], right=right[0]), LayerInputs(left=undo_left[0], right=undo_right[0])

    def scales(self) -> list[tuple[Site, Tensor]]:
        """c [signal width] of the sites that have one."""
        return [(change.site, change.values()[0]) for change in self.changes]

    def clip(self) -> Tensor | None:
        """[2]"""
        return None if self.shares is None else self.shares.sigmoid()

    def changed(self, x: Tensor, name: str) -> Tensor:
        """What enters the linear ``name`` [tokens, columns], behind all that is done to it but the rounding."""
        for site, scale in self.scales():
            if name in site.consumers:
                x = x * scale
        if self.value is not None:
            site, (matrix, _) = self.place.sites[0], self.value()
            by_head = x.unflatten(1, (len(matrix), site.repeats, site.head_dim))
            x = torch.einsum("nhrd,hde->nhre", by_head, matrix).flatten(1)
        return online.apply(x, self.ops()[0])

    def parameters(self) -> list[nn.Parameter]:
        """All but ``shares``."""
        modules = (*self.changes, self.left, self.right, self.value)
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def run_time_op(self) -> LayerInputs:
        """A copy of the matrix at run time, without parameters in it."""
        return LayerInputs(
            **{name: None if t is None else t.detach().clone() for name, t in vars(self.ops()[0]).items()}
        )

    def facts(self) -> dict[str, Any]:
        """Condition numbers of what is multiplied, the spread of c, and the shares of a range that are kept."""
        facts: dict[str, Any] = {}
        for name, matrix in {"left": self.left, "right": self.right, "value": self.value}.items():
            if matrix is not None:
                facts[f"condition_{name}"] = float(torch.linalg.cond(matrix()[0]).max())
        scales = [scale for _, scale in self.scales()]
        if scales:
            facts |= {"scale_min": float(torch.cat(scales).min()), "scale_max": float(torch.cat(scales).max())}
        clip = self.clip()
        return facts if clip is None else facts | {"clip": clip.tolist()}
