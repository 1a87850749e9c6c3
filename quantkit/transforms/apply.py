"""What the transforms of a run did to one block: numbers of a ``Solution`` become weights and input operations.

At every moment the block's tensors and the inputs kept here together compute what the source's block does: where
something stays online, the columns of the linear are divided at once by the factor as it is stored, and multiplied by
the inverse of a matrix as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.kv import LearnedKV
from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online
from quantkit.models.block import Block, Site
from quantkit.quantizers.grid import by_rows
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
    """Linear -> factor [in_features], float64, by which its columns were divided in all, before any matrix."""
    limits: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """As in ``Solution``."""
    kv: dict[str, LearnedKV] = field(default_factory=dict)
    """Attention -> what was learned about its keys and values, as it is stored; left out: nothing."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the run record."""

    def apply(self, method: str, solution: Solution) -> None:
        """Carry out ``solution``; a part of it that is not finite is left out with a warning: the identity.

        Raises:
            ValueError: it changes the channels of a linear whose input is multiplied by a matrix already.
        """
        changed = self._changed_inputs(solution)
        self._check_order(method, changed)
        for site in self.block.sites:
            change = solution.sites.get(site.name)
            if change is not None and self._sound(method, site.name, change.scale, change.shift):
                self._apply_to_site(site, change)
        for name, scale in solution.linears.items():
            if self._sound(method, name, scale, None):
                self._apply_online(name, scale, None)
        rotated: list[str] = []
        for site in self.block.sites:
            matrix = solution.matrices.get(site.name)
            if matrix is not None and self._apply_matrix(method, site, matrix):
                rotated += [site.producer, *site.consumers]
        pair, t = self.block.query_key, solution.query_key
        if pair is not None and t is not None and self._sound(method, "queries and keys", t, None):
            fold.apply_qk_scale(self.block, pair, t)
        multiplied = [name for name, op in solution.ops.items() if self._apply_op(method, name, op)]
        rescaled = [site for site in self.block.sites if site.name in solution.sites]
        rewritten = [name for site in rescaled for name in (site.producer, *site.consumers)]
        self._forget_limits([*rewritten, *solution.linears, *rotated, *multiplied])
        self._forget_clips(changed)
        lost = solution.ops.keys() - multiplied  # what was found behind a matrix that is left out
        self.limits |= {name: limits for name, limits in solution.limits.items() if name not in lost}
        for name, clip in solution.clips.items():
            if name not in lost:
                self._apply_clip(method, name, clip)
        for path, learned in solution.kv.items():
            self._apply_kv(method, path, learned.to(self.dtype))
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
            with self._meeting_the_signal(site):  # biases make up for a shift of it
                fold.apply_shift(self.block, site, change.shift.double() * applied)

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

    @contextmanager
    def _meeting_the_signal(self, site: Site) -> Iterator[None]:
        """The consumers' weights as they meet the signal itself, not what is scaled in front of them."""
        scales = [(name, self.input_of(name).scale) for name in site.consumers]
        scaled = [(self.block.weight(name), t.double()) for name, t in scales if t is not None]
        for weight, t in scaled:
            fold.divide_columns(weight, t.reciprocal())
        try:
            yield
        finally:
            for weight, t in scaled:
                fold.divide_columns(weight, t)

    def _apply_matrix(self, method: str, site: Site, matrix: Tensor) -> bool:
        """Fold ``matrix`` into a v -> o site; whether it could be."""
        try:
            if matrix.isfinite().all():
                with self._meeting_the_signal(site):
                    fold.apply_matrix(self.block, site, matrix)
                return True
            problem = "no finite numbers"
        except torch.linalg.LinAlgError:
            problem = "a singular matrix"
        self._left_out(method, site.name, problem)
        return False

    def _apply_op(self, method: str, name: str, op: LayerInputs) -> bool:
        """Multiply the input by a matrix behind everything that is done to it so far; whether that can be undone."""
        held = {field: tensor for field, tensor in vars(op).items() if tensor is not None}
        stored = {field: t.to(self.dtype if t.is_floating_point() else t.dtype) for field, t in held.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in stored.values()):
            self._left_out(method, name, "no finite numbers")
            return False
        try:
            inverse = online.inverse(LayerInputs(**stored))
        except torch.linalg.LinAlgError:
            self._left_out(method, name, "a singular matrix")
            return False
        weight = self.block.weight(name)

        def undo(chunk: slice) -> None:
            weight[chunk] = online.apply(weight[chunk].double(), inverse).to(weight.dtype)

        by_rows(undo, *weight.shape)
        self.inputs[name] = replace(self.input_of(name), **stored)
        return True

    def _apply_clip(self, method: str, name: str, clip: Tensor) -> None:
        stored = clip.to(self.dtype)
        if _are_shares(stored):
            self.inputs[name] = replace(self.input_of(name), clip=stored)
        else:
            self._left_out(method, name, "shares of a range that are not above 0 and at most 1", "nothing is clipped")

    def _apply_kv(self, method: str, path: str, learned: LearnedKV) -> None:
        if not (_are_shares(learned.key_clip) and _are_shares(learned.value_clip)):
            problem = "shares of a range that are not above 0 and at most 1"
        elif learned.key_matrix is not None and not _is_invertible(learned.key_matrix):
            problem = "no matrix for keys that has an inverse"
        else:
            self.kv[path] = learned
            return
        self._left_out(method, path, problem, "nothing is changed about keys and values")

    def _changed_inputs(self, solution: Solution) -> set[str]:
        """Linears whose input becomes something else."""
        sites = {site.name: site.consumers for site in self.block.sites}
        changed = {name for site in (*solution.sites, *solution.matrices) for name in sites.get(site, ())}
        return changed | {*solution.linears, *solution.ops}

    def _check_order(self, method: str, changed: Collection[str]) -> None:
        """Scales and shifts of channels cannot go in front of a matrix that was found for the input as it is."""
        taken = sorted(name for name in changed if self.input_of(name).op != "none")
        if taken:
            raise ValueError(
                f"{self.block.prefix}{taken[0]}: {method} changes channels behind a {self.input_of(taken[0]).op} matrix"
            )

    def _forget_limits(self, names: Iterable[str]) -> None:
        """Limits hold for weights in the basis they were found in."""
        lost = [name for name in names if self.limits.pop(name, None) is not None]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            where = f"{self.block.prefix}{lost[0]}{more}"
            self.warn(f"{where}: limits of weights are given up where these were transformed again.")

    def _forget_clips(self, names: Iterable[str]) -> None:
        """The same of shares of an input's range."""
        lost = sorted(name for name in names if self.input_of(name).clip is not None)
        for name in lost:
            self.inputs[name] = replace(self.inputs[name], clip=None)
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            where = f"{self.block.prefix}{lost[0]}{more}"
            self.warn(f"{where}: clips of inputs are given up where these were transformed again.")

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
            self._left_out(method, where, "no finite numbers")
        return sound

    def _left_out(self, method: str, where: str, problem: str, done: str = "nothing is transformed") -> None:
        self.warn(f"{self.block.prefix}{where}: {method} found {problem}; {done} there.")


def _are_shares(clip: Tensor) -> bool:
    return bool(((clip > 0) & (clip <= 1)).all())


def _is_invertible(matrix: Tensor) -> bool:
    _, failed = torch.linalg.inv_ex(matrix.double())
    return bool(matrix.isfinite().all()) and not bool(failed)
