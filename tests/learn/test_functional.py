"""Folds with gradients leave the tensors that the folds in place do, which are tested to leave the function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folded import Folded, normal, signal_width
from tiny_models import TINY
from torch import Tensor

from quantkit.learn.functional import fold_matrix, fold_query_key, fold_site
from quantkit.models.block import QueryKey, Site
from quantkit.transforms import fold


@pytest.mark.parametrize("name", TINY)
def test_as_in_place(name: str, tiny: Callable[..., Path]) -> None:
    model = Folded(tiny(name))
    block, source = model.block(1), model.block(1)
    tensors = dict(source.tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    linears = {info.name for info in block.linears}
    for number, site in enumerate(block.sites):
        width = signal_width(block, site)
        t, z = model.factor(width, 10 * number), None
        if fold.shift_obstacle(block, site) is None:
            z = normal(width, seed=10 * number + 1)
        fold_site(tensors, site, t, z, site.consumers)
        fold.apply_scale(block, site, t, linears)
        if z is not None:
            fold.apply_shift(block, site, z * t)
        if site.head_dim:
            matrix = normal(width // site.head_dim, site.head_dim, site.head_dim, seed=10 * number + 2)
            fold_matrix(tensors, site, matrix, torch.linalg.inv(matrix).mT)
            fold.apply_matrix(block, site, matrix)
    assert block.query_key is not None
    t = model.factor(block.query_key.width, 5)
    fold_query_key(tensors, block.query_key, t)
    fold.apply_qk_scale(block, block.query_key, t)
    assert tensors.keys() == block.tensors.keys()
    for key, tensor in block.tensors.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-12, atol=1e-13, msg=key)
        assert torch.equal(source.tensors[key], before[key])  # the block that was given is left alone


def test_gradients() -> None:
    """Through both sides of a v -> o site of grouped heads, fused rows, biases, and tied channels of the keys."""
    site = Site("value", "linear", "qkv", ("o",), rows=torch.arange(8, 12), repeats=2, head_dim=2)
    tie = torch.tensor([0, 0, 1, 1])
    pair = QueryKey("linear", "qkv", "qkv", tie, 2, 1, torch.arange(4), torch.arange(4, 8))
    shapes = {"qkv.weight": (12, 5), "qkv.bias": (12,), "o.weight": (3, 8), "o.bias": (3,)}
    base = {name: normal(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}

    def changed(t: Tensor, z: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(base)
        fold_site(tensors, site, t, z, site.consumers)
        fold_query_key(tensors, pair, s)
        return tuple(tensors.values())

    arguments = [normal(4, seed=7).exp(), normal(4, seed=8), normal(2, seed=9).exp()]
    assert torch.autograd.gradcheck(changed, [tensor.requires_grad_() for tensor in arguments])
