"""Run a part of a block again, on recorded inputs, with other weights and inputs of some of its linears.

What a search compares: the output of the part with candidates in place, against its output as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.models.block import Site


@dataclass(frozen=True)
class Call:
    """One recorded call of a part of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counts: Tensor | None
    """[batch, tokens] bool: the tokens that count; None: all."""


@dataclass(frozen=True)
class Substitute:
    """Stands in for a linear: y = change(x) @ weight.T + bias."""

    weight: Tensor
    """[rows, columns] float32"""
    bias: Tensor | None
    change: Callable[[Tensor], Tensor] | None = None
    """What is done to the input first. Linears that read one tensor and have the same ``change`` do it once."""


class Replay:
    """The smallest module around the consumers of a site, or the one consumer by itself."""

    def __init__(self, owner: nn.Module, prefix: str, calls: Sequence[Call]) -> None:
        """
        Args:
            owner: the module; it is put back as it was after every use.
            prefix: path of ``owner`` in the block with a trailing dot.
            calls: what it was called with.
        """
        self._owner = owner
        self._prefix = prefix
        self._calls = calls
        self._reference: list[Tensor] | None = None
        self._size = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(len(output) for output in self.reference)

    @property
    def reference(self) -> list[Tensor]:
        """Per call the output as it is, [tokens that count, width]; computed once."""
        if self._reference is None:
            self._reference = list(self.outputs({}))
            self._size = sum(float(output.square().sum(dtype=torch.float64)) for output in self._reference)
        return self._reference

    def outputs(self, substitutes: Mapping[str, Substitute]) -> Iterator[Tensor]:
        """Per call the output with ``substitutes`` (path in the block -> stand-in), [tokens that count, width]."""
        with torch.inference_mode(False), torch.no_grad(), self._substituted(substitutes):
            for call in self._calls:
                output = self._owner(*call.args, **call.kwargs)
                output = output[0] if isinstance(output, tuple) else output
                yield output.flatten(0, -2) if call.counts is None else output[call.counts]

    def error(self, substitutes: Mapping[str, Substitute]) -> float:
        """Sum of (output - reference)**2 over that of reference**2; inf if an output is not finite."""
        total = 0.0
        for output, reference in zip(self.outputs(substitutes), self.reference, strict=True):
            total += float((output - reference).square().sum(dtype=torch.float64))
        error = total / self._size if self._size else total
        return error if error == error else float("inf")

    @contextmanager
    def _substituted(self, substitutes: Mapping[str, Substitute]) -> Iterator[None]:
        changed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (input, change) -> (the input, changed input)
        modules = []
        for path, substitute in substitutes.items():
            module = self._owner.get_submodule(path.removeprefix(self._prefix)) if path != self._prefix[:-1] else None
            modules.append(module or self._owner)
            modules[-1].forward = _stand_in(substitute, changed)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _stand_in(
    substitute: Substitute, changed: dict[tuple[int, int], tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if substitute.change is not None:
            key = id(x), id(substitute.change)
            known = changed.get(key)
            if known is None or known[0] is not x:
                changed.clear()  # only what is read right now is worth its memory
                known = changed[key] = x, substitute.change(x)
            x = known[1]
        return F.linear(x, substitute.weight, substitute.bias)

    return forward


def owner_of(site: Site) -> str:
    """Path of the smallest module that holds every consumer of ``site``; '' if that is the block itself."""
    paths = [consumer.split(".")[:-1] for consumer in site.consumers]
    common = paths[0]
    for path in paths[1:]:
        common = [a for a, b in zip(common, path, strict=False) if a == b]
    return ".".join(common)
