"""The rotated scalar quantiser against what is known of its levels and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantkit.kernels import hadamard
from quantkit.kv.cache import KVCache, QuantisedLayer
from quantkit.kv.interface import LayerFacts
from quantkit.kv.rotation import RandomHadamard
from quantkit.kv.rotation_scalar import Config, Rotated, _levels, layer_kv


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method(bits: int, gain: str = "unbiased") -> Rotated:
    return Rotated(bits, Config(gain=gain).gain, RandomHadamard("test"))


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.00950)])
def test_levels_are_the_means_of_their_cells(bits, error):
    """The condition of Lloyd and Max, by the integrals of the normal density."""
    levels = _levels(bits, torch.float64, torch.device("cpu"))
    assert torch.equal(levels, -levels.flip(0))
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2).tolist(), math.inf]

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    kept = 0.0
    for level, low, high in zip(levels.tolist(), edges, edges[1:], strict=False):
        share = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
        assert level == pytest.approx((density(low) - density(high)) / share, abs=2e-5)
        kept += share * level**2
    assert 1 - kept == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize(
    ("bits", "head_dim", "mse", "unbiased"),
    [(1, 128, 0.3634, 0.571), (2, 128, 0.1175, 0.133), (3, 1024, 0.03455, 0.0358), (4, 1024, 0.00950, 0.00959)],
)
def test_errors_on_normal_numbers(bits, head_dim, mse, unbiased):
    """At 3 and 4 bits and head_dim 128 the length, which is kept apart, takes 3 % of the error away."""
    states = drawn(1, 8, 256, head_dim)
    for gain, error in (("mse", mse), ("unbiased", unbiased)):
        wrong = (method(bits, gain).round(states) - states).square().sum() / states.square().sum()
        assert float(wrong) == pytest.approx(error, rel=0.02)


def test_errors_do_not_depend_on_what_is_rotated():
    """Outlier channels, spikes, constants, rows of the Hadamard matrix itself: at most what normal numbers have."""
    states = drawn(1, 5, 100, 64)
    states[:, 1][..., [3, 40]] += 30
    states[:, 2] = torch.eye(64).repeat(2, 1)[:100] * 7 + 0.01 * states[:, 2]
    states[:, 3] = 1 + 0.01 * states[:, 3]
    states[:, 4] = hadamard.multiply(torch.eye(64)).repeat(2, 1)[:100] + 0.01 * states[:, 4]
    read = method(2).round(states)
    wrong = ((read - states).square().sum(-1) / states.square().sum(-1)).mean(-1)
    assert wrong[0, 0] == pytest.approx(0.133, rel=0.05)
    assert (wrong < 0.14).all()


def test_gains():
    states = drawn(1, 2, 30, 96)
    for bits in (1, 2, 3, 4):
        read = method(bits).round(states)
        along, length = (states * read).sum(-1), states.square().sum(-1)
        torch.testing.assert_close(along, length, rtol=1e-3, atol=0)  # float16 holds the gain to 2**-11
        read = method(bits, "mse").round(states)
        torch.testing.assert_close((read * (states - read)).sum(-1) / length, torch.zeros(1, 2, 30), rtol=0, atol=1e-3)


@pytest.mark.parametrize("head_dim", [8, 10, 24, 80, 96, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_store_reads_back_what_round_gives(bits, head_dim):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        states = (drawn(2, 3, 9, head_dim) * torch.logspace(-2, 2, 9)[:, None]).to(dtype)
        kind = method(bits)
        store = kind.store()
        read = store.append(states)
        assert read.dtype == dtype
        assert torch.equal(read, kind.round(states))
        assert torch.equal(read, kind.round(states.clone().requires_grad_()))
        expected = 2 * 3 * 9 * (4 * math.ceil(head_dim * bits / 32) + 2) + head_dim  # the signs
        assert sum(tensor.nbytes for tensor in store.tensors()) == expected


def test_bits_per_element():
    layer = QuantisedLayer(layer_kv(Config(bits=2), LayerFacts(0, 128, 128)))
    layer.update(drawn(1, 4, 256, 128), drawn(1, 4, 256, 128))
    assert KVCache([layer]).memory_report().bits_per_element == pytest.approx(2.125, rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_odd_tokens(dtype):
    states = drawn(1, 1, 8, 64)
    states[:, :, 1] = 0
    states[:, :, 2] = 0.5
    states[:, :, 3] *= 1000
    if dtype != torch.float16:
        states[:, :, 4] = 1e9
        states[:, :, 5] *= 1e-9
    kind = method(2)
    read = kind.round(states.to(dtype))
    assert read.isfinite().all()
    assert (read[:, :, 1] == 0).all()
    states[:, :, 6, 3] = float("nan")
    broken = kind.round(states.to(dtype))
    assert broken[:, :, 6].isnan().all()
    assert torch.equal(broken[:, :, :6], read[:, :, :6])


def test_layers_keys_and_values_have_signs_of_their_own():
    config, signs = Config(), set()
    for layer in (0, 1):
        kv = layer_kv(config, LayerFacts(layer, 64, 64))
        for part in (kv.keys, kv.values):
            part.round(torch.ones(1, 1, 1, 64))
            assert isinstance(part, Rotated)
            signs.add(tuple(next(iter(part.rotation.tensors())).tolist()))
    assert len(signs) == 4


def test_gradients_go_straight_through():
    states = drawn(1, 1, 5, 16).requires_grad_()
    (method(2).round(states) * 2).sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, torch.full_like(states, 2))
