"""Run a block on chosen calibration samples, with gradients to other values of some of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantkit.calibrate.hidden import HiddenStates
from quantkit.calibrate.streams import StreamName, Streams

_SAME = 1e-3
"""Relative difference up to which a sample run by itself gives what it gave in its batch: the order of additions."""


@dataclass(frozen=True)
class Part:
    """Some samples of one batch."""

    batch: int
    rows: list[int]
    """In the batch."""
    samples: list[int]


@dataclass(frozen=True)
class Outcome:
    """What a block made of a part, and what a loss wants to know beside it."""

    output: Tensor
    """[samples, tokens, channels] float32"""
    target: Tensor
    """The same."""
    mask: Tensor
    """[samples, tokens] bool: the tokens that count."""


class Samples:
    """The calibration samples before a block, one by one, however they are batched."""

    def __init__(
        self,
        module: nn.Module,
        streams: Streams,
        targets: HiddenStates,
        *,
        skip_first: int,
        stream: StreamName = "quantised",
    ) -> None:
        """
        Args:
            module: the block; from here on nothing in it is an inference tensor.
            streams: standing before it.
            targets: what it should make of the samples.
            skip_first: positions at the start of every sample, padding not counted, that do not count.
            stream: what enters the block.
        """
        self._module = module
        self._streams = streams
        self._targets = targets
        self._skip_first = skip_first
        self._stream = stream
        self._loaded: tuple[int, Tensor, Tensor] | None = None
        usable_in_autograd(module)
        self._separable = self._can_be_cut()

    def with_target(self) -> list[int]:
        """The samples that did not break in an earlier block and have a finite target."""
        found = []
        for number in range(self._streams.batches):
            sums = self._batch(number)[1].sum(dim=(1, 2), dtype=torch.float64)
            usable = sums.isfinite() & self._mask(number).any(dim=1)
            found += [sample for sample, good in zip(self._streams.samples(number), usable, strict=True) if good]
        return found

    def targets(self, samples: Collection[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(target, mask) of ``samples``, batch by batch."""
        for part in self.parts(samples):
            yield self._batch(part.batch)[1][part.rows], self._mask(part.batch)[part.rows]

    def parts(self, samples: Collection[int]) -> list[Part]:
        """``samples``, batch by batch."""
        parts = []
        for number in range(self._streams.batches):
            inside = [sample for sample in self._streams.samples(number) if sample in samples]
            if inside:
                first = self._streams.samples(number).start
                parts.append(Part(number, [sample - first for sample in inside], inside))
        return parts

    def run(self, part: Part, values: Mapping[str, Tensor]) -> Outcome:
        """The block on ``part``.

        Args:
            values: tensor name in the block -> what takes its place.
        """
        hidden, target = self._batch(part.batch)
        arguments, rows = self._streams.arguments(part.batch), part.rows
        if self._separable and len(rows) < len(hidden):
            output = self._call(hidden[rows], _cut(arguments, rows, len(hidden)), values)
        else:
            output = self._call(hidden, arguments, values)[rows]
        return Outcome(output, target[rows], self._mask(part.batch)[rows])

    def _call(self, hidden: Tensor, arguments: Any, values: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = arguments
        output = functional_call(self._module, dict(values), (hidden, *args), kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.float()

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Input and target of a batch; kept until another one is wanted."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None  # never two at a time
            self._loaded = number, self._streams.hidden(self._stream, number), self._targets.batch(number).float()
        return self._loaded[1:]

    def _mask(self, number: int) -> Tensor:
        mask = self._streams.token_mask(number)
        return mask & (mask.cumsum(dim=1) > self._skip_first) if mask.shape[1] > self._skip_first else mask

    @torch.no_grad()
    def _can_be_cut(self) -> bool:
        """Does a sample run by itself give what it gave in its batch?

        Which of the other arguments' dimensions is the batch cannot be told from their shapes, so it is tried out.
        """
        hidden, _ = self._batch(0)
        rows = [len(hidden) - 1]
        whole = self._call(hidden, self._streams.arguments(0), {})[rows]
        try:
            alone = self._call(hidden[rows], _cut(self._streams.arguments(0), rows, len(hidden)), {})
        except Exception:  # whatever code the model has may stumble over arguments of another shape
            return False
        difference = torch.linalg.vector_norm(alone - whole)
        return alone.shape == whole.shape and bool(difference <= _SAME * torch.linalg.vector_norm(whole))


def usable_in_autograd(module: nn.Module) -> None:
    """Make tensors of ``module`` that were born in inference mode ordinary ones, in place and without a copy."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(torch.from_dlpack(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = torch.from_dlpack(buffer)


def _cut(value: Any, rows: list[int], batch: int) -> Any:
    """Arguments of a block for some samples of a batch: of a tensor whose first dimension is samples (x heads)."""
    if isinstance(value, Tensor):
        if value.dim() and batch > 1 and value.shape[0] and value.shape[0] % batch == 0:
            return value.unflatten(0, (batch, -1))[rows].flatten(0, 1)
        return value
    if isinstance(value, dict):
        return {key: _cut(part, rows, batch) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(part, rows, batch) for part in value)
    return value
