"""A store for methods that keep tokens in chunks, with the newest ones as they came until a chunk of them is due.

    held:   coded, whole units         tail, as it came
            [ u ][ u ] ... [ u ]       t t t ... t

While the tail holds ``chunk + recent`` tokens or more, its oldest ``chunk`` are encoded. So what is coded after n
tokens depends on n alone: for a store that was never cropped it is ``chunk * ((n - recent) // chunk)`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kv.quantiser import straight


class ChunkCodec(Protocol):
    """Codes of whole units; a unit is as many neighbouring tokens as cannot be told apart in what is stored."""

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """Tensors [batch, heads, units, ...] for ``states`` [batch, heads, units * unit, head_dim]."""

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        """[batch, heads, units * unit, head_dim] in ``dtype``."""


class ChunkStore:
    """A ``Store`` of coded units and a tail.

    Args:
        unit: tokens of a unit.
        chunk: tokens that are encoded at a time, a multiple of ``unit``.
        recent: tokens that are never encoded as long as they are among so many newest ones.
    """

    def __init__(self, codec: ChunkCodec, *, unit: int, chunk: int, recent: int = 0) -> None:
        self.hold = False
        """Encode nothing before ``settle``: new tokens may be taken back."""
        self._codec, self._unit, self._chunk, self._recent = codec, unit, chunk, recent
        self._parts: dict[str, Tensor] = {}
        self._tail: Tensor | None = None

    @property
    def coded(self) -> int:
        """Tokens held as codes."""
        return self._unit * next(iter(self._parts.values())).shape[2] if self._parts else 0

    @property
    def length(self) -> int:
        return self.coded + (0 if self._tail is None else self._tail.shape[2])

    @property
    def elements(self) -> int:
        if self._tail is None:
            return 0
        batch, heads, _, head_dim = self._tail.shape
        return batch * heads * self.length * head_dim

    @property
    def grain(self) -> tuple[int, int]:
        return 0, self._unit

    def coded_after(self, tokens: int) -> int:
        return max(0, (tokens - self._recent) // self._chunk * self._chunk)

    def append(self, states: Tensor) -> Tensor:
        self.put(states)
        read = self.read(0, self.length, states.dtype)
        if states.requires_grad and torch.is_grad_enabled():
            new = states.shape[2]
            return torch.cat([read[:, :, :-new], straight(states, lambda _: read[:, :, -new:])], dim=2)
        return read

    @torch.no_grad()
    def put(self, states: Tensor) -> None:
        held = [] if self._tail is None else [self._tail.to(states.dtype)]
        self._tail = torch.cat([*held, states.detach()], dim=2)  # a copy: of a view the whole would stay alive
        if not self.hold:
            self.settle()

    @torch.no_grad()
    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert self._tail is not None
        coded, unit = self.coded, self._unit
        tail = self._tail[:, :, max(0, first - coded) : max(0, last - coded)].to(dtype)
        if first >= coded:
            return tail
        stop = min(last, coded)
        units = slice(first // unit, -(-stop // unit))
        parts = {name: part[:, :, units] for name, part in self._parts.items()}
        read = self._codec.decode(parts, self._tail.shape[-1], dtype)
        start = first - unit * (first // unit)
        read = read[:, :, start : start + stop - first]
        return torch.cat([read, tail], dim=2) if tail.shape[2] else read

    @torch.no_grad()
    def settle(self) -> None:
        """Encode what is due."""
        if self._tail is None:
            return
        due = self.coded_after(self._tail.shape[2])  # counted from where the tail begins, a whole number of chunks
        if due:
            new = self._codec.encode(self._tail[:, :, :due])
            held = self._parts
            self._parts = {name: torch.cat([held[name], part], dim=2) for name, part in new.items()} if held else new
            self._tail = self._tail[:, :, due:].clone()

    def keep(self, first: int, last: int) -> None:
        """As ``Store`` says.

        Raises:
            QuantkitError: ``last`` would part a unit.
        """
        coded = self.coded
        if last < coded and last % self._unit:
            raise QuantkitError(
                f"the last {self.length - last} tokens cannot be taken back: {coded - last} of them are encoded, in "
                f"groups of {self._unit} that cannot be parted; call activate_past_recording() on the cache before "
                "they are made, crop at a whole group, or begin a new cache."
            )
        units = min(first, coded) // self._unit, min(last, coded) // self._unit
        kept = self._parts if units[0] < units[1] else {}
        self._parts = {name: part[:, :, units[0] : units[1]].clone() for name, part in kept.items()}
        if self._tail is not None:
            self._tail = self._tail[:, :, max(0, first - coded) : max(0, last - coded)].clone()

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._parts = {name: change(part) for name, part in self._parts.items()}
        self._tail = None if self._tail is None else change(self._tail)

    def tensors(self) -> Iterable[Tensor]:
        yield from self._parts.values()
        if self._tail is not None:
            yield self._tail

    def state(self) -> dict[str, Tensor]:
        return self._parts if self._tail is None else self._parts | {"tail": self._tail}

    def load(self, state: dict[str, Tensor]) -> None:
        self._tail = state.get("tail")
        self._parts = {name: part for name, part in state.items() if name != "tail"}
