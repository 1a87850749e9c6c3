"""The experts of a mixture one by one, where transformers keeps them merged in 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantkit.layers.fusing import gated_linear


class ExpertNames(NamedTuple):
    """What a checkpoint calls the three projections of an expert."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class QuantExperts(nn.Module):
    """Experts as children ``0``, ``1``, ..., each with its three linears under their checkpoint names.

    Quantised and plain linears may stand side by side: an expert that a recipe left out stays ``nn.Linear``.

    Args:
        experts: (gate, up, down) of each expert, gate and up [intermediate, hidden], down [hidden, intermediate].
        names: how the three are called.
        act_fn: applied to the gate projection.
    """

    def __init__(
        self,
        experts: Iterable[tuple[nn.Module, nn.Module, nn.Module]],
        names: ExpertNames,
        act_fn: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.names = names
        self.act_fn = act_fn
        self.num_experts = 0
        for linears in experts:
            self.add_module(str(self.num_experts), nn.ModuleDict(dict(zip(names, linears, strict=True))))
            self.num_experts += 1

    def expert(self, index: int) -> nn.ModuleDict:
        """The linears of one expert, by name."""
        expert = self._modules[str(index)]
        assert isinstance(expert, nn.ModuleDict)
        return expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] int64, the experts of each token; ``num_experts`` stands for none.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, hidden].
        """
        mixed = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index == self.num_experts:
                continue
            expert = self.expert(index)
            position, token = routed(top_k_index, index)
            x = hidden_states[token]
            gate, up, down = (expert[name] for name in self.names)
            x = gated_linear(gate(x), up(x), self.act_fn, down) * top_k_weights[token, position, None]
            mixed.index_add_(0, token, x.to(mixed.dtype))
        return mixed


def routed(top_k_index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Which choice of which tokens fell on ``expert``: (position in 0 .. k - 1, token), in the order of its rows."""
    position, token = torch.where(top_k_index.t() == expert)
    return position, token


def split_experts(block: nn.Module, linears: Collection[str], names: ExpertNames) -> dict[str, nn.Module]:
    """Put ``QuantExperts`` of plain linears, which share their memory, in place of merged experts of ``block``.

    Args:
        block: changed in place.
        linears: module paths; merged experts are taken apart where one of theirs is among them.
        names: what the projections of an expert are called in ``linears``.

    Returns:
        Path -> the merged module that was there, to be put back by who wants it back.
    """
    found = {
        path: module
        for path, module in block.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)  # where it is a linear, it is no expert's
        and any(name.startswith(f"{path}.") for name in linears)
    }
    for path, merged in found.items():
        block.set_submodule(path, _one_by_one(merged, names))
    return found


def _one_by_one(merged: Any, names: ExpertNames) -> QuantExperts:
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
