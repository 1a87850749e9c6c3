"""The only place that picks an implementation of the quantised linear.

An implementation is one row: whether it can take this call, and the function. Rows are tried in order, fastest first;
the reference takes everything and specifies what the others must return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from quantkit.kernels import reference

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear


class Implementation(NamedTuple):
    """One way to compute ``reference.linear``."""

    name: str
    takes: Callable[[Tensor, QuantLinear], bool]
    """(x, layer) -> whether ``run`` supports this device, dtype, format and number of tokens."""
    run: Callable[[Tensor, QuantLinear], Tensor]
    """(x [..., in_features], layer) -> [..., out_features]: input scale, activation rounding, product and bias."""


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("reference", takes=lambda x, layer: True, run=reference.linear),
)


def linear(x: Tensor, layer: QuantLinear) -> Tensor:
    """Apply ``layer`` to ``x`` [..., in_features]."""
    return choose(x, layer).run(x, layer)


def choose(x: Tensor, layer: QuantLinear) -> Implementation:
    """The first row of the table that takes this call."""
    return next(row for row in IMPLEMENTATIONS if row.takes(x, layer))
