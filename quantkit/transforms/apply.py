"""What the transforms of a run did to one block: numbers of a ``Solution`` become weights and input operations.

At every moment the block's tensors and the inputs kept here together compute what the source's block does: where
something stays online, the columns of the linear are divided at once by the factor as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.models.block import Block, Site
from quantkit.transforms import fold
from quantkit.transforms.interface import SiteChange, Solution


@dataclass
class Transformed:
    """A block on its way through the transforms, and what they leave for the rounding."""

    block: Block
    quantised: Collection[str]
    """Linears that will be quantised."""
    dtype: torch.dtype
    """Of stored vectors."""
    warn: Callable[[str], None]
    inputs: dict[str, LayerInputs] = field(default_factory=dict)
    """Linear -> what is done to its input at run time; left out: nothing."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> factor [in_features], float64, by which its columns were divided in all."""
    limits: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """As in ``Solution``."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the run record."""

    def apply(self, method: str, solution: Solution) -> None:
        """Carry out ``solution``; a part of it that is not finite is left out with a warning: the identity."""
        for site in self.block.sites:
            change = solution.sites.get(site.name)
            if change is not None and self._sound(method, site.name, change.scale, change.shift):
                self._apply_to_site(site, change)
        for name, scale in solution.linears.items():
            if self._sound(method, name, scale, None):
                self._apply_online(name, scale, None)
        self.limits |= solution.limits
        self.facts += [{"method": method, **fact} for fact in solution.facts]

    def input_of(self, name: str) -> LayerInputs:
        return self.inputs.get(name, LayerInputs())

    def _apply_to_site(self, site: Site, change: SiteChange) -> None:
        if site.kind == "none":
            for name in site.consumers:
                if name in self.quantised:
                    self._apply_online(name, change.scale, change.shift)
            return
        # The scale first: it leaves a norm's bias unrounded, and folding a shift makes up for that rounding.
        applied = torch.ones(1, dtype=torch.float64)
        if change.scale is not None:
            applied = fold.apply_scale(self.block, site, change.scale, self.quantised)
            for name in site.consumers:
                self._divided(name, fold.consumer_columns(site, applied))
        if change.shift is not None:
            # Biases make up for a shift of the signal, so the weights have to be those that meet the signal itself.
            scales = [(name, self.input_of(name).scale) for name in site.consumers]
            online = [(self.block.weight(name), t.double()) for name, t in scales if t is not None]
            for weight, t in online:
                fold.divide_columns(weight, t.reciprocal())
            fold.apply_shift(self.block, site, change.shift.double() * applied)
            for weight, t in online:
                fold.divide_columns(weight, t)

    def _apply_online(self, name: str, scale: Tensor | None, shift: Tensor | None) -> None:
        """Input x -> (x - shift) * scale for the linear alone, behind what is done to it already.

        Weight and bias make up for the stored factors, not for those asked for.
        """
        before = self.input_of(name)
        own = torch.ones(1) if before.scale is None else before.scale
        inputs = before
        factor = torch.ones(1, dtype=torch.float64)
        if scale is not None:
            stored = (own.double() * scale.double()).to(self.dtype)
            factor = stored.double() / own.double()
            inputs = replace(inputs, scale=stored)
        if shift is not None or before.shift is not None:
            old = torch.zeros(1, dtype=torch.float64) if before.shift is None else before.shift.double()
            moved = old if shift is None else old - shift.double()
            stored = (moved * factor).to(self.dtype)
            self._add_to_bias(name, old - stored.double() / factor)
            inputs = replace(inputs, shift=stored)
        if scale is not None:
            fold.divide_columns(self.block.weight(name), factor)
            self._divided(name, factor)
        self.inputs[name] = inputs

    def _add_to_bias(self, name: str, shift: Tensor) -> None:
        """bias += W @ shift, float64: what the input has lost."""
        bias = self.block.tensors[f"{name}.bias"]
        self.block.tensors[f"{name}.bias"] = (bias.double() + self.block.weight(name).double() @ shift).to(bias.dtype)

    def _divided(self, name: str, columns: Tensor) -> None:
        known = self.columns.get(name)
        self.columns[name] = columns.double() if known is None else known * columns.double()

    def _sound(self, method: str, where: str, scale: Tensor | None, shift: Tensor | None) -> bool:
        sound = (scale is None or bool((scale.isfinite() & (scale > 0)).all())) and (
            shift is None or bool(shift.isfinite().all())
        )
        if not sound:
            self.warn(f"{self.block.prefix}{where}: {method} found no finite numbers; nothing is transformed there.")
        return sound
