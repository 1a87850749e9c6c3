"""The experts of a mixture one by one, where transformers keeps them merged in 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


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
            position, token = torch.where(top_k_index.t() == index)
            x = hidden_states[token]
            x = self.act_fn(expert[self.names.gate](x)) * expert[self.names.up](x)
            x = expert[self.names.down](x) * top_k_weights[token, position, None]
            mixed.index_add_(0, token, x.to(mixed.dtype))
        return mixed
