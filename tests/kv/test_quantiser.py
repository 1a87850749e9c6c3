"""The grid of keys and values against the formula written out token by token."""

import math

import pytest
import torch

from quantkit.kv.quantiser import MinMax

BITS = range(2, 9)
KINDS = [MinMax(bits, symmetric) for bits in BITS for symmetric in (False, True)]


def hard_states(head_dim: int, tokens: int = 9) -> torch.Tensor:
    """[2, 3, tokens, head_dim]: sizes that grow, a channel that stands out, and one each of the odd tokens."""
    states = torch.randn(2, 3, tokens, head_dim, generator=torch.Generator().manual_seed(head_dim))
    states *= torch.logspace(-3, 2, tokens)[:, None]
    states[..., 1] += 8
    states[0, 0, 0] = 0
    states[0, 1, 2] = states[0, 1, 2].abs() + 0.5
    states[1, 2, 3] = -states[1, 2, 3].abs() - 0.5
    states[1, 1, 4] = -0.25
    return states


def one_token(values: list[float], bits: int, symmetric: bool, low: float = 1, high: float = 1) -> list[float]:
    """What a token reads back as: Python floats, one number at a time."""
    smallest, largest = low * min(0.0, *values), high * max(0.0, *values)
    steps = 2**bits - 1
    if symmetric:
        step = max(largest, -smallest) / (2 ** (bits - 1) - 1) or 1.0
        zero = 2 ** (bits - 1)
    else:
        if smallest == largest == 0:
            smallest, largest = -1.0, 1.0
        step = (largest - smallest) / steps
    step = float(torch.tensor(step, dtype=torch.float16))
    if not symmetric:
        zero = round(-smallest / step)  # Python's round takes ties to even, too
    return [(min(max(round(value / step) + zero, 0), steps) - zero) * step for value in values]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_the_formula(kind):
    states = hard_states(24)
    found = kind.round(states.double()).flatten(0, -2)
    for row, values in zip(found, states.double().flatten(0, -2).tolist(), strict=True):
        assert row.tolist() == pytest.approx(one_token(values, kind.bits, kind.symmetric), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 10, 24, 128])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_store_reads_back_what_round_gives(kind, head_dim, dtype):
    states = hard_states(head_dim).to(dtype)
    store = kind.store()
    read = store.append(states)
    assert read.dtype == dtype
    assert torch.equal(read, kind.round(states))
    assert torch.equal(read, kind.round(states.clone().requires_grad_()))
    tokens = 2 * 3 * 9
    assert (store.length, store.elements) == (9, tokens * head_dim)
    expected = tokens * (4 * math.ceil(head_dim * kind.bits / 32) + (2 if kind.symmetric else 3))
    assert sum(tensor.nbytes for tensor in store.tensors()) == expected


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_error_is_half_a_step(kind):
    states = hard_states(64)[..., 1:, :]
    span = states.amax(-1).clamp(min=0) - states.amin(-1).clamp(max=0)
    steps = 2**kind.bits - 1
    step = 2 * states.abs().amax(-1) / (steps - 1) if kind.symmetric else span / steps
    error = (kind.round(states) - states).abs().amax(-1)
    # A step of float16 may be short by 2**-11 of it, over the whole grid.
    assert (error <= step * (0.5 + steps * 2**-11) * 1.0001).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rounding_twice_changes_nothing(kind):
    """Where both ends of the grid are in use; a step that float16 rounds up may leave the last code unused."""
    once = kind.round(hard_states(64))
    twice = kind.round(once)
    same = (once == twice).all(dim=-1).double().mean()
    assert same >= (0.97 if kind.bits <= 4 else 0.75)
    assert (once - twice).abs().max() <= (once.amax() - once.amin()) / (2**kind.bits - 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_of_one_sign_and_of_zeros(kind):
    zeros = torch.zeros(1, 1, 2, 16)
    assert torch.equal(kind.round(zeros), zeros)
    positive = torch.linspace(3, 4, 16).expand(1, 1, 1, 16)
    for states in (positive, -positive):  # the grid holds 0, so 3 to 4 share its last codes
        read = kind.round(states)
        assert (read - states).abs().max() <= 4 / (2 ** (kind.bits - 1) - 1) * 0.51
        assert (read * states >= 0).all()


def test_ties_go_to_even():
    halves = torch.arange(0, 15.1, 0.5).expand(1, 1, 1, -1)  # step 1, zero point 0
    expected = torch.tensor([float(round(value / 2)) for value in range(31)])
    assert torch.equal(MinMax(4).round(halves)[0, 0, 0], expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_shares_of_the_range_clip_each_end(symmetric):
    states = hard_states(32).double()
    kind = MinMax(4, symmetric, low=0.5, high=0.75)
    for row, values in zip(kind.round(states).flatten(0, -2), states.flatten(0, -2).tolist(), strict=True):
        assert row.tolist() == pytest.approx(one_token(values, 4, symmetric, 0.5, 0.75), rel=1e-12, abs=0)


def test_a_power_of_two_scales_the_result():
    states = hard_states(32)
    for kind in (MinMax(3), MinMax(4, symmetric=True)):
        assert torch.equal(kind.round(4 * states)[0, 1], 4 * kind.round(states)[0, 1])


def test_sizes_that_float16_does_not_reach():
    tiny, huge = torch.full((1, 1, 1, 8), 1e-12), torch.full((1, 1, 1, 8), 1e9)
    huge[..., 0] = -1e9
    for states in (tiny, huge):
        assert torch.equal(MinMax(4).store().append(states), MinMax(4).round(states))
        assert MinMax(4).round(states).isfinite().all()


def test_gradients_pass_the_rounding_and_reach_the_clips():
    """Every code is held where it is, so between two roundings the result is (x + constant) inside the grid, and
    (q - z) * s at its ends."""
    states = hard_states(32).double().requires_grad_()
    low, high = (torch.tensor(share, dtype=torch.float64, requires_grad=True) for share in (0.8, 0.7))
    MinMax(4, low=low, high=high).round(states).sum().backward()
    middle = (states > 0.7 * states.amin(-1, keepdim=True).clamp(max=0)) & (
        states < 0.6 * states.amax(-1, keepdim=True).clamp(min=0)
    )
    assert middle.sum() > 500
    torch.testing.assert_close(states.grad[middle], torch.ones_like(states.grad[middle]))
    # What is cut off moves with its end of the grid: d/d(high) of the highest value is the maximum itself.
    cut = torch.tensor([[[[-1.0, 0.2, 10.0]]]], dtype=torch.float64)
    high.grad = None
    MinMax(4, low=low, high=high).round(cut)[..., 2].sum().backward()
    assert high.grad == pytest.approx(10.0, rel=0.06)


def test_gradients_reach_what_a_store_is_given():
    states = hard_states(16)
    store = MinMax(4).store()
    store.append(states[:, :, :4])
    given = states[:, :, 4:].clone().requires_grad_()
    read = store.append(given)
    assert torch.equal(read, MinMax(4).round(states))
    read.sum().backward()
    assert given.grad is not None
    assert (given.grad != 0).double().mean() > 0.9
    assert not any(tensor.requires_grad for tensor in store.tensors())
