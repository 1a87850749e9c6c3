"""KIVI against its formula, its table of errors, and what its groups are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.kv.cache import KVCache, QuantisedLayer
from quantkit.kv.interface import LayerFacts, LayerKV
from quantkit.kv.kivi import Config, Keys, Values, layer_kv


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(numbers: list[float], bits: int) -> list[float]:
    """One grid, number by number, in Python floats."""
    low = float(torch.tensor(min(numbers)).half())
    step = max(float(torch.tensor((max(numbers) - low) / (2**bits - 1)).half()), 2.0**-24)
    return [min(max(round((x - low) / step), 0), 2**bits - 1) * step + low for x in numbers]


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_equal_the_formula_per_channel_and_group_of_tokens(bits):
    states = drawn(2, 3, 24, 10).double() * torch.logspace(-2, 2, 10)
    found = Keys(bits, 8, 0).round(states)
    for row, channels in zip(found.flatten(0, 1), states.flatten(0, 1), strict=True):
        for first in (0, 8, 16):
            for channel in range(10):
                expected = by_formula(channels[first : first + 8, channel].tolist(), bits)
                assert row[first : first + 8, channel].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_values_equal_the_formula_per_token_and_group_of_channels(bits):
    states = drawn(2, 3, 5, 24).double() * torch.logspace(-2, 2, 24)
    found = Values(bits, 8, 0).round(states)
    for row, channels in zip(found.flatten(0, 2), states.flatten(0, 2), strict=True):
        for first in (0, 8, 16):
            expected = by_formula(channels[first : first + 8].tolist(), bits)
            assert row[first : first + 8].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("head_dim", "group"), [(80, 20), (24, 24), (128, 32), (36, 18), (7, 7)])
def test_channels_of_a_value_group_divide_the_head(head_dim, group):
    parts = Values(2, 32, 0).encode(drawn(1, 2, 3, head_dim))
    assert parts["scale"].shape == (1, 2, 3, head_dim // group)


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_of_keys_run_along_tokens_and_those_of_values_along_channels(bits):
    """What is constant in a group has no error at all; the other way round it has."""
    of_channels = torch.arange(-64.0, 64.0).expand(1, 2, 128, 128)  # a channel is the same in all tokens
    of_tokens = of_channels.mT
    keys, values = Keys(bits, 32, 128), Values(bits, 32, 0)
    assert torch.equal(keys.round(of_channels), of_channels)
    assert torch.equal(values.round(of_tokens), of_tokens)
    assert not torch.equal(keys.round(of_tokens), of_tokens)
    assert not torch.equal(values.round(of_channels), of_channels)


@pytest.mark.parametrize(
    ("bits", "group", "error"),
    [(2, 32, 0.154), (2, 64, 0.202), (2, 128, 0.251), (4, 32, 0.0061), (4, 64, 0.0080), (4, 128, 0.0100)],
)
def test_errors_on_normal_numbers(bits, group, error):
    """Of min-max grids on N(0, 1): 2**18 numbers, which settles them to less than 1 %."""
    states = drawn(1, 8, 256, 128, seed=group)
    for method in (Keys(bits, group, 0), Values(bits, group, 0)):
        mean = float((method.round(states) - states).square().mean())
        assert mean == pytest.approx(error, rel=0.02)


def test_what_is_coded_after_how_many_tokens():
    keys, values = Keys(2, 32, 128).store(), Values(2, 32, 128).store()
    states = drawn(1, 1, 385, 8)
    for tokens in range(1, 386):
        new = states[:, :, tokens - 1 : tokens]
        for store in (keys, values):
            read = store.append(new)
            assert read.shape[2] == store.length == tokens
            assert torch.equal(read[:, :, store.coded :], states[:, :, store.coded : tokens])
        assert keys.coded == tokens // 128 * 128
        assert values.coded == max(0, tokens - 128)


@pytest.mark.parametrize("bits", [2, 4])
def test_bits_per_element(bits):
    """b + 32 / 32 for what is coded: all keys of 256 tokens, all values but 128."""
    config = Config(bits=bits)
    layer = QuantisedLayer(layer_kv(config, LayerFacts(0, 128, 128)))
    layer.update(drawn(1, 2, 256, 128).half(), drawn(1, 2, 256, 128).half())
    expected = ((bits + 1) + (bits + 1 + 16) / 2) / 2
    assert KVCache([layer]).memory_report().bits_per_element == pytest.approx(expected, rel=1e-6)
    coded = LayerKV(Keys(bits, 32, 0), Values(bits, 32, 0))
    layer = QuantisedLayer(coded)
    layer.update(drawn(1, 2, 256, 128), drawn(1, 2, 256, 128))
    assert KVCache([layer]).memory_report().bits_per_element == pytest.approx(bits + 1, rel=1e-6)


@pytest.mark.parametrize("method", [Keys(2, 8, 8), Values(2, 8, 8), Keys(4, 8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_odd_tokens(method, dtype):
    """Zeros, constants, one token a thousand times the others, sizes that float16 does not reach: finite; NaN stays."""
    states = drawn(1, 1, 40, 16)
    states[:, :, 8:16] = 0
    states[:, :, 17] *= 1000
    states[:, :, 24:32] = 0.25
    if dtype != torch.float16:
        states[:, :, 33] = 1e9
    read = method.round(states.to(dtype))
    assert read.dtype == dtype
    assert read.isfinite().all()
    assert (read[:, :, 8:16] == 0).all()
    assert (read[:, :, 24:32] == 0.25).all()
    states[:, :, 3, 5] = float("nan")
    broken = method.round(states.to(dtype))
    assert broken[:, :, 3, 5].isnan().all()
    assert broken[:, :, 16:33].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "2 or 4"),
        ({"group_size": 12}, "multiple of 8"),
        ({"residual": 40}, "residual 40 is no multiple of group_size 32"),
        ({"window": 4}, "window"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_gradients_go_straight_through():
    states = drawn(1, 1, 20, 8).requires_grad_()
    method = Keys(2, 8, 8)
    (method.round(states) * 3).sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, torch.full_like(states, 3))
    assert torch.equal(method.round(states), method.round(states.detach()))
