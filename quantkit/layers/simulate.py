"""A dense block that computes what the packed one will where activations are quantised.

Dense weights decoded from the codes stand in for the packed ones; what is left to imitate is what happens to the input
of a linear. It is done by the function that the packed layers use, so that both round alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quantkit.kernels.reference import fake_quantize
from quantkit.layers.quant_experts import ExpertNames, split_experts
from quantkit.recipe import ActivationScheme


def simulate_inputs(
    block: nn.Module, activations: ActivationScheme, input_scales: Mapping[str, Tensor | None], experts: ExpertNames
) -> None:
    """Make the linears of ``block`` scale and round their input, in place.

    Args:
        block: dense, its weights those of the codes (input scales not multiplied in).
        activations: how inputs are rounded.
        input_scales: path of each quantised linear -> [in_features] or None.
        experts: what the projections of an expert are called in ``input_scales``.
    """
    split_experts(block, input_scales, experts)
    for name, scale in input_scales.items():
        block.get_submodule(name).register_forward_pre_hook(_rounding(activations, scale))


def _rounding(activations: ActivationScheme, scale: Tensor | None) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if scale is None else args[0] * scale.to(args[0].dtype)
        return (fake_quantize(x, activations), *args[1:])

    return hook
