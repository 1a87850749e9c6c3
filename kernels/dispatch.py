"""The only place that picks an implementation of the quantised linear.

An implementation is one row of a table: which layers it runs, for how many rows of x it is worth it, the layout of the
weight that it reads, and the function. Rows are tried in order, fastest first; the reference takes everything and
specifies what the others must return.

A layout is made once per layer (``prepare``: when a model is loaded, else at the first call) from the stored tensors.
It takes the place of the stored codes in memory and is never saved: ``QuantLinear`` puts the codes back, byte for byte,
before it is saved, copied, moved, cast or loaded into, and after that the layout is made again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kernels import reference
from quantkit.kernels.cpu import int4, int8, int8_weights
from quantkit.kernels.lacking import Lacking, say_once
from quantkit.kernels.triton import integer, weight_only

if TYPE_CHECKING:
    from quantkit.layers.quant_linear import QuantLinear

ANY_ROWS = range(sys.maxsize)


class Layout(NamedTuple):
    """How a weight lies in memory while the model runs."""

    name: str
    pack: Callable[[QuantLinear], Any]
    """From the stored tensors of a layer, on their device; what it returns is handed to ``run``. None: these tensors
    cannot be packed, and the layer does without the layout."""
    restore: Callable[[Any, QuantLinear], Tensor] | None
    """(what ``pack`` returned, layer) -> ``weight_packed`` (or ``weight``) bit for bit, so that it need not stay in
    memory; scales and zero points stay. None: it does stay, beside the layout."""


class Implementation(NamedTuple):
    """One way to compute ``reference.linear``."""

    name: str
    refuses: Callable[[QuantLinear, torch.device], str | None]
    """(layer, device) -> why it cannot run this layer there, None if it can. Looks at sizes, format and dtype only: the
    layer may have no data, and be elsewhere. What the machine is to blame for is ``Lacking``."""
    run: Callable[[Tensor, QuantLinear, Any], Tensor]
    """(x [..., in_features] on the layer's device and in its dtype, layer, what ``layout.pack`` returned) ->
    [..., out_features]: what is done to the input, product and bias. Without gradient. May be called with any number
    of rows, none included."""
    layout: Layout | None = None
    """The weight that ``run`` reads; None: the stored tensors. A layer has one layout, that of the first row of the
    table that takes it; rows with another one are passed over."""
    rows: range = ANY_ROWS
    """Rows of x for which it is worth it."""


_INT4 = Layout("int4", int4.pack, int4.restore)
_INT8_WEIGHTS = Layout("int8 weights", int8_weights.pack, int8_weights.restore)
_INT8 = Layout("int8", int8.pack, int8.restore)
_BYTES = Layout("bytes", integer.pack, integer.restore)
_PLANES = Layout("planes", weight_only.pack, weight_only.restore)

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("cpu int4", int4.refuses, int4.few_rows, _INT4, range(int4.FEW_ROWS + 1)),
    Implementation("cpu int4 unpacked", int4.refuses, int4.many_rows, _INT4),
    Implementation(
        "cpu int8 weights", int8_weights.refuses, int8_weights.few_rows, _INT8_WEIGHTS, range(int8_weights.FEW_ROWS + 1)
    ),
    Implementation("cpu int8 weights unpacked", int8_weights.refuses, int8_weights.many_rows, _INT8_WEIGHTS),
    Implementation("cpu int8", int8.refuses, int8.linear, _INT8),
    Implementation("triton integer", integer.refuses, integer.run, _BYTES),
    Implementation("triton weight-only", weight_only.refuses, weight_only.run, _PLANES),
    Implementation("reference", lambda layer, device: None, lambda x, layer, packed: reference.linear(x, layer)),
)


@dataclass(frozen=True, eq=False)
class Runtime:
    """What ``prepare`` found out about a layer and made for it."""

    table: tuple[Implementation, ...]
    able: tuple[Implementation, ...]
    """The rows of ``table`` that run the layer as it lies in memory, in order."""
    layout: Layout | None
    packed: Any
    """What ``layout.pack`` returned."""
    scale: Tensor
    weight: Tensor | None
    """The layer's tensors that this was made for; the weight is None where the layout took its place."""

    def is_of(self, layer: QuantLinear) -> bool:
        """Are these still the tensors of ``layer``, and the rows those of the table?"""
        return (
            self.scale is layer.weight_scale
            and self.weight is layer._buffers[layer.weight_name]
            and self.table is IMPLEMENTATIONS
        )


_only_reference = False


@contextmanager
def only_reference() -> Iterator[None]:
    """Within it every layer of the process runs through the reference: with 4-bit activations, a last digit that
    another order of summation changes can turn a code over, and what follows is no longer comparable."""
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before


def linear(x: Tensor, layer: QuantLinear) -> Tensor:
    """Apply ``layer`` to ``x`` [..., in_features].

    Raises:
        QuantkitError: ``x`` has another dtype than the layer, and autocast is not there to convert it.
    """
    chosen = choose(x, layer)
    return chosen.run(x, layer, None if layer.runtime is None else layer.runtime.packed)


def choose(x: Tensor, layer: QuantLinear) -> Implementation:
    """The first row of the table that takes this call."""
    runtime = layer.runtime
    # Tensors cannot be repacked while a compiler traces the call: it takes the layer as it is.
    if not (torch.compiler.is_compiling() or _only_reference) and (runtime is None or not runtime.is_of(layer)):
        runtime = prepare(layer)
    fits = x.device == layer.weight_scale.device and x.shape[-1:] == (layer.in_features,)
    if x.dtype != layer.weight_scale.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise QuantkitError(
                f"the input is {x.dtype} and the scales of this layer ({layer.in_features} -> {layer.out_features}) "
                f"are {layer.weight_scale.dtype}: convert the input or the model with .to(...)."
            )
        fits = False
    if runtime is None or _only_reference or not fits or (torch.is_grad_enabled() and x.requires_grad):
        return IMPLEMENTATIONS[-1]
    rows = x.numel() // layer.in_features
    for row in runtime.able:
        if row.rows.start <= rows < row.rows.stop:
            return row
    raise AssertionError("the last row of the table takes any number of rows")


_preparing = threading.Lock()


def prepare(layer: QuantLinear) -> Runtime:
    """Choose the rows that can run ``layer`` where it is, and put its weight into their layout."""
    # A tensor born in inference mode could not be written to, once it is a buffer again.
    with _preparing, torch.inference_mode(False), torch.no_grad():
        if layer.runtime is not None and layer.runtime.is_of(layer):  # another thread was faster
            return layer.runtime
        layer.unpack()
        device = layer.weight_scale.device
        against = [row.refuses(layer, device) for row in IMPLEMENTATIONS]
        able = [row for row, reason in zip(IMPLEMENTATIONS, against, strict=True) if reason is None]
        offloaded = _is_offloaded(layer)
        layout, packed = None, None
        for candidate in dict.fromkeys(row.layout for row in able if row.layout is not None):
            packed = None if offloaded else candidate.pack(layer)
            if packed is not None:
                layout = candidate
                break
        if all(row.layout is None for row in able):
            for reason in against:
                if isinstance(reason, Lacking):
                    say_once(device.type, reason)
        if layout is not None and layout.restore is not None:
            layer._buffers[layer.weight_name] = None
        runtime = Runtime(
            IMPLEMENTATIONS,
            tuple(row for row in able if row.layout is None or row.layout is layout),
            layout,
            packed,
            layer.weight_scale,
            layer._buffers[layer.weight_name],
        )
        layer.runtime = None if offloaded else runtime  # which would keep what the hooks want to free
        return runtime


def prepare_all(model: torch.nn.Module) -> None:
    """``prepare`` every quantised linear of ``model`` that has its tensors in memory."""
    from quantkit.layers.quant_linear import QuantLinear

    if _only_reference:
        return
    for module in model.modules():
        if isinstance(module, QuantLinear) and not module.weight_scale.is_meta:
            prepare(module)


def explain(layer: QuantLinear, device: torch.device, rows: int) -> tuple[Implementation, dict[str, str]]:
    """The row that takes ``layer`` on ``device`` for ``rows`` rows of x; and of each row before it, why it does not.

    ``layer`` needs no data: without it there is no telling whether a layout turns the tensors down.
    """
    against: dict[str, str] = {}
    layout: Layout | None = None
    for row in IMPLEMENTATIONS:
        reason = row.refuses(layer, device)
        if reason is None and layout is not None and row.layout not in (None, layout):
            reason = f"the weight is in the layout '{layout.name}'"
        if reason is None:
            layout = layout or row.layout
            if rows in row.rows:
                return row, against
            reason = f"for {row.rows.start} to {row.rows.stop - 1} rows"
        against[row.name] = reason
    raise AssertionError("the last row of the table takes everything")


def _is_offloaded(layer: QuantLinear) -> bool:
    """Do accelerate's hooks bring the tensors at every call and take them away again?"""
    hook = getattr(layer, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
