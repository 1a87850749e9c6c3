"""What a method of keeping keys and values has to offer, and how one layer uses two of them.

A method is asked for two things: a store, which keeps what it is given and reads it back as it was kept, and the same
rounding without a store, through which gradients pass. Keys are what attention hands to a cache, behind the rotary
embedding; an invertible matrix M may come in front of their method:

    kept: Q(k M)        read: Q(k M) M**-1        q . (Q(k M) M**-1) = (q M**-T) . Q(k M)

so nothing is done to queries (FlatQuant, Sun et al., arXiv 2410.09426, section 3.2; QuaRot, arXiv 2404.00456, has the
Hadamard matrix there). In front of the rotary embedding M would have to commute with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Store(Protocol):
    """The keys or the values of one layer, as a method keeps them. Empty at first.

    What is in the store is never encoded again, and does not depend on how the tokens were split between calls.
    """

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def elements(self) -> int:
        """Numbers that the held tokens stand for: batch * heads * length * head_dim."""

    @property
    def grain(self) -> tuple[int, int]:
        """(s, g): number s of the tokens held, and every g-th behind it, begins something that is encoded as one."""

    def coded_after(self, tokens: int) -> int:
        """How many of its first ``tokens`` a store holds as codes that got them one by one; the others are as they
        came."""

    def append(self, states: Tensor) -> Tensor:
        """Take in ``states`` [batch, heads, tokens, head_dim] behind what is held.

        Returns:
            All tokens as they read back, [batch, heads, length, head_dim] in the dtype of ``states``; the new ones
            with the gradient of ``Method.round``.
        """

    def put(self, states: Tensor) -> None:
        """As ``append``, and nothing is read back."""

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Tokens number ``first`` to ``last - 1`` of those held, as they read back, [batch, heads, last - first,
        head_dim] in ``dtype``. What it takes grows with their number alone."""

    def keep(self, first: int, last: int) -> None:
        """Drop the tokens before number ``first`` of those held, and number ``last`` and all behind it.

        A method that keeps tokens in groups may hold on to some before ``first`` until their group can go.

        Raises:
            QuantkitError: ``last`` would part a group.
        """

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``change`` of it; all have the batch as their first dimension."""

    def tensors(self) -> Iterable[Tensor]:
        """Everything that the store keeps alive."""

    def state(self) -> dict[str, Tensor]:
        """All that an empty store of the same method has to ``load`` to go on as this one."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Hold what ``state`` of another store gave."""


@runtime_checkable
class ChunkedStore(Store, Protocol):
    """A store that encodes several tokens at a time, some time after they came."""

    hold: bool
    """Encode nothing before ``settle``: new tokens may be taken back."""

    def settle(self) -> None:
        """Encode what is due."""


class Method(Protocol):
    """A way to keep keys or values."""

    def store(self) -> Store:
        """An empty store."""

    def round(self, states: Tensor) -> Tensor:
        """``states`` [batch, heads, tokens, head_dim] as a store of their own would read them back, bit for bit.

        Differentiable with respect to ``states`` and to what the method itself holds.
        """


class KeyTransform(Protocol):
    """An invertible matrix M on the last dimension."""

    def apply(self, keys: Tensor) -> Tensor:
        """k M for every key k of ``keys`` [..., head_dim]."""

    def undo(self, keys: Tensor) -> Tensor:
        """k M**-1."""

    def tensors(self) -> Iterable[Tensor]:
        """Everything that it keeps alive."""


@dataclass(frozen=True)
class LayerKV:
    """How one layer keeps its keys and values."""

    keys: Method
    values: Method
    transform: KeyTransform | None = None
    """In front of ``keys``."""

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both [batch, heads, tokens, head_dim] as a cache would return them; nothing is kept."""
        if self.transform is None:
            return self.keys.round(keys), self.values.round(values)
        return self.transform.undo(self.keys.round(self.transform.apply(keys))), self.values.round(values)


@dataclass(frozen=True)
class LayerFacts:
    """What a method may know of a layer before it is given anything."""

    layer: int
    """Its number in the model."""
    key_dim: int
    """Numbers in a key of one head; 0: the model does not say."""
    value_dim: int
    config: PreTrainedConfig | None = None
    """Of the model; None: of a block whose attention does not hold it."""
