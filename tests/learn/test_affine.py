"""Matrices open band by band, have an inverse, and are learned through it."""

from __future__ import annotations

import pytest
import torch
from folded import normal
from torch import Tensor

from quantkit.learn.affine import Mixing, bandwidth
from quantkit.learn.functional import fold_matrix, transposed_inverse
from quantkit.models.block import Block, LinearInfo, Site
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Solution

ONE = torch.ones(1)


def drawn(heads: int, width: int, stability: float, dominant: bool, size: float = 1.0) -> Mixing:
    mixing = Mixing(heads, width, stability, dominant)
    mixing.entries.data = size * normal(heads, width, width, seed=0).float()
    return mixing


def test_the_band_opens_from_the_diagonal_to_the_corners() -> None:
    for width, epochs in ((64, 20), (4096, 20), (7, 3), (2, 5), (1, 4), (5, 40)):
        bands = [bandwidth(width, epoch, epochs) for epoch in range(epochs)]
        assert bands == sorted(bands)
        assert (bands[0], bands[-1]) == (1, width)  # rounding down in floating point ends at 4095
    assert [bandwidth(9, epoch, 5) for epoch in range(5)] == [1, 3, 5, 7, 9]
    assert bandwidth(64, 0, 1) == 64


@pytest.mark.parametrize("dominant", [True, False])
def test_what_is_not_open_is_zero_and_gets_no_gradient(dominant: bool) -> None:
    mixing = drawn(2, 6, 0.5, dominant)
    eye = torch.eye(6).expand(2, -1, -1)
    assert torch.equal(mixing(ONE), eye)
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    for band in range(1, 7):
        mixing.open_to(band)
        mixing.zero_grad()
        undo = mixing(ONE)
        opened = (distance > 0) & (distance < band)
        assert torch.equal(undo != eye, opened.expand(2, -1, -1))
        (transposed_inverse(undo) @ normal(6, 3, seed=2).float()).square().sum().backward()
        grad = mixing.entries.grad
        assert grad is not None
        assert torch.equal(grad != 0, opened.expand(2, -1, -1))
        if not dominant:  # the diagonal stays, the stability factor does not leave the rest
            assert torch.equal(undo, torch.where(opened, 0.5 * mixing.entries.detach(), eye))


def test_entries_that_open_late_start_at_zero() -> None:
    mixing = Mixing(1, 8, 1.0, dominant=True)
    optimiser = torch.optim.Adam([mixing.entries], lr=0.1)
    for band in (1, 3, 3, 8):
        before = mixing(ONE).detach()
        mixing.open_to(band)
        assert torch.equal(mixing(ONE), before)  # no jump
        optimiser.zero_grad()
        (mixing(ONE) - normal(8, 8, seed=1).float()).square().sum().backward()
        optimiser.step()
    assert int((mixing.entries != 0).sum()) == 8 * 8 - 8


@pytest.mark.parametrize("size", [0.01, 1.0, 1e6])
def test_a_dominant_matrix_has_an_inverse_whatever_is_learned(size: float) -> None:
    mixing = drawn(3, 40, 1.0, True, size)
    mixing.open_to(40)
    undo = mixing(ONE).detach()
    off = undo - torch.eye(40)
    assert float(off.abs().sum(-1).max()) <= 0.9 + 1e-5
    if size < 0.02:  # nothing to be held back
        assert torch.equal(off, torch.where(torch.eye(40) > 0, 0.0, mixing.entries.detach()))
    inverse = transposed_inverse(undo).mT
    assert float((undo @ inverse - torch.eye(40)).abs().max()) < 1e-6
    condition = undo.abs().sum(-1).amax(-1) * inverse.abs().sum(-1).amax(-1)
    assert float(condition.max()) <= 19


def test_masked_entries_are_added_to_the_diagonal() -> None:
    """diag(1 / t) (I + N) is the authors' matrix: 1 / t on the diagonal, stability * entry in the band."""
    mixing, t = drawn(2, 5, 0.1, False), normal(10, seed=3).exp().float()
    mixing.open_to(3)
    authors = (mixing(t) / t.view(2, 5, 1)).detach()
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    want = torch.where((distance > 0) & (distance < 3), 0.1 * mixing.entries.detach(), 0.0)
    torch.testing.assert_close(authors, want + torch.diag_embed(1 / t.view(2, 5)))


@pytest.mark.parametrize("dominant", [True, False])
def test_gradients_through_the_inverse(dominant: bool) -> None:
    """Finite differences in float64: grouped heads, fused rows, biases, rows held back and rows that are not."""
    site = Site("value", "linear", "qkv", ("o",), rows=torch.arange(3, 9), repeats=2, head_dim=3)
    shapes = {"qkv.weight": (9, 4), "qkv.bias": (9,), "o.weight": (2, 12), "o.bias": (2,)}
    base = {name: normal(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    mixing = Mixing(2, 3, 0.5, dominant).double()
    mixing.open_to(3)

    def changed(entries: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(base)
        undo: Tensor = torch.func.functional_call(mixing, {"entries": entries}, (t,))
        fold_matrix(tensors, site, transposed_inverse(undo), undo)
        return tuple(tensors.values())

    entries = normal(2, 3, 3, seed=7)
    entries[0] *= 0.1
    t = normal(6, seed=8).exp()
    assert torch.autograd.gradcheck(changed, [entries.requires_grad_(), t.requires_grad_()])


def test_no_inverse_is_told_from_one() -> None:
    undo = torch.stack((torch.eye(4), torch.ones(4, 4)))
    inverse = transposed_inverse(undo)
    assert torch.equal(inverse[0], torch.eye(4))
    assert inverse[1].isnan().all()
    tensors = {"v.weight": normal(8, 5, seed=0).float(), "o.weight": normal(3, 8, seed=1).float()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    infos = (LinearInfo("v", 8, 5, False), LinearInfo("o", 3, 8, False))
    site = Site("attention.value", "linear", "v", ("o",), head_dim=4)
    block = Block(0, "layers.0.", tensors, dict.fromkeys(tensors, torch.float32), infos, (site,))
    said: list[str] = []
    Transformed(block, ["v", "o"], torch.float32, said.append).apply(
        "affinequant", Solution(matrices={"attention.value": inverse})
    )
    assert said == ["layers.0.attention.value: affinequant found no finite numbers; nothing is transformed there."]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
