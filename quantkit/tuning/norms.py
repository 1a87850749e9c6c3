"""The norms of a block: which there are, and the values that they take a step away from where they stand.

    relative    w = w0 + (offset + w0) * (exp(d) - 1)        b = b0 + |offset + w0| * d        d: one number per entry
    absolute    w = w0 + d                                   b = b0 + d

offset + w0 is what the norm multiplies by. It varies by orders of magnitude over channels once transforms have folded
scales into it, so a step that suits all of them is a share of it. At d = 0 nothing changes, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_QUERY_OR_KEY = re.compile(r"(q|k|query|key)_?(layer)?_?norm")
Delta = dict[str, Tensor]
"""Tensor name in the block -> d, float32, of the tensor's shape."""


def find_norms(module: nn.Module, *, include_qk: bool = False) -> dict[str, list[str]]:
    """Path of every norm with a weight per channel -> all paths it is reached by, itself first.

    Args:
        include_qk: also norms of queries and keys, which act per head before the rotary embedding.
    """
    found: dict[int, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        weight = getattr(part, "weight", None)
        if "norm" not in type(part).__name__.lower() or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        if include_qk or not _QUERY_OR_KEY.fullmatch(path.rpartition(".")[2]):
            found.setdefault(id(part), []).append(path)
    return {paths[0]: paths for paths in found.values()}


class NormValues:
    """Values of the norms of one block as functions of d."""

    def __init__(
        self,
        module: nn.Module,
        paths: Mapping[str, list[str]],
        stored_dtypes: Mapping[str, torch.dtype],
        *,
        offset: float,
        relative: bool,
    ) -> None:
        """
        Args:
            module: the block.
            paths: from ``find_norms``.
            stored_dtypes: tensor name -> dtype; a tensor that is not stored is not tuned.
            offset: norms multiply by offset + weight.
            relative: d is a share of what the norm multiplies by.
        """
        self.start: dict[str, Tensor] = {}
        """Tensor name -> float32 values."""
        self.gain: dict[str, Tensor] = {}
        """Tensor name, also of a bias -> what its norm multiplies by."""
        self._aliases: dict[str, list[str]] = {}
        self._dtypes = stored_dtypes
        self._relative = relative
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for path, every in paths.items():
            gain = offset + parameters[f"{path}.weight"].detach()
            for leaf in ("weight", "bias"):
                name, *others = (f"{other}.{leaf}" for other in every)
                if name in parameters and name in stored_dtypes:
                    self.start[name] = parameters[name].detach().clone()
                    self.gain[name] = gain
                    self._aliases[name] = [name, *(other for other in others if other in stored_dtypes)]

    def zeros(self) -> Delta:
        """d of the start."""
        return {name: torch.zeros_like(value) for name, value in self.start.items()}

    def at(self, delta: Delta) -> dict[str, Tensor]:
        """Tensor name -> float32 values; gradients reach ``delta``."""
        return {name: self._value(name, d) for name, d in delta.items()}

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        """Tensor name -> what is left of the values in the dtypes they are stored in, float32."""
        return {name: self._value(name, d.detach()).to(self._dtypes[name]).float() for name, d in delta.items()}

    def changed(self, delta: Delta) -> dict[str, Tensor]:
        """What ``stored`` gives, without the tensors that stay as they were, and under all their names."""
        before = self.stored(self.zeros())
        values = {name: value for name, value in self.stored(delta).items() if not torch.equal(value, before[name])}
        return {alias: value for name, value in values.items() for alias in self._aliases[name]}

    def changed_share(self, delta: Delta) -> float:
        """The share of all entries that are stored as other numbers than before."""
        before, after = self.stored(self.zeros()), self.stored(delta)
        changed = sum(int((after[name] != before[name]).sum()) for name in after)
        return changed / max(sum(value.numel() for value in after.values()), 1)

    def delta_for(self, path: str, scale: Tensor, shift: Tensor | None) -> Delta:
        """d at which the norm ``path`` emits y * scale + shift where it emitted y: [channels] float64 each, scale > 0.

        Only for ``relative``.
        """
        weight, bias = f"{path}.weight", f"{path}.bias"
        delta = {weight: scale.log().float()}
        if bias in self.start:
            moved = self.start[bias].double() * (scale - 1) + (0 if shift is None else shift)
            gain = self.gain[bias].double().abs()
            delta[bias] = torch.where(gain > 0, moved / gain, 0.0).float()
        return delta

    def _value(self, name: str, d: Tensor) -> Tensor:
        if not self._relative:
            return self.start[name] + d
        gain = self.gain[name]
        return self.start[name] + (gain * d.expm1() if name.endswith(".weight") else gain.abs() * d)
