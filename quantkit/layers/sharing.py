"""Linears that read one tensor and do the same to it first (q, k and v; gate and up) do it once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.architectures import ARCHITECTURES

Made = TypeVar("Made")


class SharedInput:
    """What the first of several readers made of a tensor, or what came with it, until the last one has asked for it."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._left = 0
        self._last: tuple[Tensor, int, str, Any] | None = None
        self._untouched = False
        """What is held was offered, and nobody asked for it yet."""
        self._taken: bool | None = None
        """Whether any offer was; None: there was none."""

    def of(self, x: Tensor, make: Callable[[], Made], kind: str = "values") -> Made:
        """``make()``, or what it returned to another reader of this very tensor that wants the same ``kind`` of it."""
        if torch.compiler.is_compiling():  # a compiler sees by itself what is computed twice
            return make()
        made: Made
        last = self._last
        if last is not None and last[0] is x and last[1:3] == (_version(x), kind):
            made, self._left = last[3], self._left - 1
            self._taken = True if self._untouched else self._taken
        else:
            made, self._left = make(), self.readers - 1
            self._last = x, _version(x), kind, made
        self._untouched = False
        if self._left <= 0:
            self._last = None  # held no longer than needed
        return made

    def offer(self, x: Tensor, made: Any, kind: str) -> bool:
        """Hold ``made``, which whoever made ``x`` made with it, for all readers of x; False: nobody took what was
        offered first, so that it is not worth it."""
        if self._taken is False:
            self._last = None
            return False
        self._last, self._left, self._untouched = (x, _version(x), kind, made), self.readers, True
        self._taken = bool(self._taken)
        return True


def _version(x: Tensor) -> int:
    """Counts what was done to ``x`` in place."""
    return 0 if x.is_inference() else x._version


def share_inputs(model: nn.Module) -> None:
    """Link the linears of ``model`` that read the output of one norm and store equal tensors for what is done to it.

    A model of unknown architecture stays as it is: nothing says there which linears read one tensor.
    """
    architecture = ARCHITECTURES.get(type(model).__name__)
    if architecture is None:
        return
    for block in model.get_submodule(architecture.blocks).children():
        readers: dict[tuple[str, str], list[QuantLinear]] = {}
        for path, module in block.named_modules():
            if isinstance(module, QuantLinear):
                pattern = re.sub(r"\.\d+(?=\.)", ".*", path)
                for group in architecture.norm_groups:
                    if pattern in group.consumers:
                        readers.setdefault((group.site, path.rpartition(".")[0]), []).append(module)
        for layers in readers.values():
            _link(layers)


def _link(layers: list[QuantLinear]) -> None:
    """Give those of ``layers`` that do the same to their input one ``SharedInput``."""
    while layers:
        first, *layers = layers
        alike = [first, *(layer for layer in layers if _does_the_same(first, layer))]
        layers = [layer for layer in layers if all(layer is not other for other in alike)]
        if len(alike) > 1:
            shared = SharedInput(len(alike))
            for layer in alike:
                layer.shared_input = shared


def _does_the_same(one: QuantLinear, other: QuantLinear) -> bool:
    if one.in_features != other.in_features or one.format.activations != other.format.activations:
        return False
    ours, theirs = vars(one.inputs), vars(other.inputs)
    if one.format.activations is None and not any(tensor is not None for tensor in ours.values()):
        return False  # there is nothing to do
    return all(_equal(ours[name], theirs[name]) for name in ours)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.is_meta or other.is_meta:  # offloaded: comes when it is needed
        return False
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
