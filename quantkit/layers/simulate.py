"""A dense block that computes what the packed one will where activations are quantised.

Dense weights decoded from the codes stand in for the packed ones; what is left to imitate is what happens to the input
of a linear. It is done by the function that the packed layers use, so that both round alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quantkit.kernels.reference import fake_quantize
from quantkit.layers.quant_experts import ExpertNames, QuantExperts
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
    for path, module in list(block.named_modules()):
        if any(name.startswith(f"{path}.0.") for name in input_scales) and hasattr(module, "gate_up_proj"):
            block.set_submodule(path, _one_by_one(module, experts))
    for name, scale in input_scales.items():
        block.get_submodule(name).register_forward_pre_hook(_rounding(activations, scale))


def _rounding(activations: ActivationScheme, scale: Tensor | None) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if scale is None else args[0] * scale.to(args[0].dtype)
        return (fake_quantize(x, activations), *args[1:])

    return hook


def _one_by_one(merged: Any, names: ExpertNames) -> QuantExperts:
    """Merged experts as separate linears that share their memory."""
    width = merged.gate_up_proj.shape[1] // 2
    return QuantExperts(
        (
            (_linear(gate_up[:width]), _linear(gate_up[width:]), _linear(down))
            for gate_up, down in zip(merged.gate_up_proj, merged.down_proj, strict=True)
        ),
        names,
        merged.act_fn,
    )


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
