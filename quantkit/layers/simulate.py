"""A dense block that computes what the packed one will.

Dense weights decoded from the codes stand in for the packed ones; what is left to imitate is what happens to the input
of a linear. It is done by the function that the packed layers use, so that both round alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.layer import LayerFormat, LayerInputs
from quantkit.kernels.reference import transform_input
from quantkit.layers.quant_experts import ExpertNames, split_experts
from quantkit.recipe import ActivationScheme


def simulate_inputs(
    block: nn.Module, formats: Mapping[str, LayerFormat], inputs: Mapping[str, LayerInputs], experts: ExpertNames
) -> None:
    """Make linears of ``block`` scale, shift, multiply by a matrix and round their input, in place.

    Linears that do the same to the same tensor (q, k and v) get one tensor, the same object: whoever hooks them later
    sees that they share their input.

    Args:
        block: dense; the weights are those that meet the changed input.
        formats: path of each linear -> how its input is rounded; one that neither rounds it nor has ``inputs`` stays
            as it is. Static activations without a ``static_scale`` are rounded over the range at hand.
        inputs: path -> what else is done; left out: nothing.
        experts: what the projections of an expert are called in ``formats``.
    """
    changes = {name: (layer.activations, inputs.get(name, LayerInputs())) for name, layer in formats.items()}
    keys = {name: _key(*change) for name, change in changes.items()}
    wanted = [name for name, key in keys.items() if any(part is not None for part in key)]
    split_experts(block, wanted, experts)
    shared: dict[Any, _SharedInput] = {}
    for name in wanted:
        hook = shared.setdefault(keys[name], _SharedInput(*changes[name]))
        block.get_submodule(name).register_forward_pre_hook(hook)


def _key(activations: ActivationScheme | None, inputs: LayerInputs) -> tuple[Any, ...]:
    """Equal where the same is done to an input; None for everything that is not done."""
    return activations, *(None if t is None else (t.dtype, _bytes(t)) for t in vars(inputs).values())


def _bytes(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return raw


class _SharedInput:
    """A pre-hook for all linears that do the same to their input; remembers what it made of the last one."""

    def __init__(self, activations: ActivationScheme | None, inputs: LayerInputs) -> None:
        self._activations = activations
        # Not inference tensors: tuning takes gradients through what they are multiplied with.
        with torch.inference_mode(False):
            self._inputs = LayerInputs(**{name: t if t is None else t.clone() for name, t in vars(inputs).items()})
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0
        self._changed: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        changed = self._changed
        if changed is None or self._input is None or self._input() is not x or self._version != _version(x):
            changed = self._changed = transform_input(x, self._inputs, self._activations)
            # What was made of a tensor lives no longer than the tensor: a block holds no more than it would anyway.
            self._input, self._version = weakref.ref(x, self._forget), _version(x)
        return (changed, *args[1:])

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if gone is self._input:
            self._input = self._changed = None


def _version(x: Tensor) -> int:
    """Grows when ``x`` is written to; inference tensors do not count."""
    return 0 if x.is_inference() else x._version
