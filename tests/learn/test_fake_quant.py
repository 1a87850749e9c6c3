"""What is trained is what is deployed, bit for bit, and its gradients lead downhill."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from looked import gaussian, weights_of
from torch import Tensor, nn

from quantkit.blockwise import _limited
from quantkit.formats.layer import LayerInputs
from quantkit.kernels.reference import fake_quantize, transform_input
from quantkit.learn.fake_quant import Clip, InputRounding, reach, round_weight, search_factors
from quantkit.quantizers import rtn
from quantkit.quantizers.grid import group_count
from quantkit.recipe import Scheme, WeightScheme

SCHEMES = ["W2A16G32", "W2SA16G32", "W3A16GC", "W3SA16GC", "W4ZA16G16", "W4A16G40", "WNF4A16G32", "W8A16GC"]


def rounded(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    return rtn.quantize(weight, scheme, dtype, rtn.Config()).dequantize()


def random_clip(scheme: WeightScheme, rows: int, columns: int, dtype: torch.dtype, seed: int = 5) -> Clip:
    sides = 1 if scheme.is_symmetric else 2
    shape = sides, rows, group_count(columns, scheme.group_size)
    start = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    return Clip(start, scheme, dtype)


def stored(weight: Tensor, clip: Clip, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    """What a run stores for limits that a transform returns."""
    low, high = clip.ends(weight).detach()
    state: Any = SimpleNamespace(limits={"x": (low, high)})
    layer: Any = SimpleNamespace(weights=scheme)
    return rounded(_limited(weight, state, "x", layer), scheme, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    scheme = weights_of(name, 100)  # 100 columns: most groups leave a short last one
    weight = gaussian(24, 100, seed=1) * gaussian(100, seed=2).exp()
    assert torch.equal(round_weight(weight, scheme, dtype), rounded(weight, scheme, dtype))
    clip = random_clip(scheme, 24, 100, dtype)
    assert torch.equal(clip(weight), stored(weight, clip, scheme, dtype))
    assert not torch.equal(clip(weight), rounded(weight, scheme, dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_strange_rows_stay_finite(name: str) -> None:
    scheme = weights_of(name, 64)
    weight = gaussian(6, 64, seed=1)
    weight[0], weight[1], weight[2] = 0, 0.7, -0.7
    weight[3].abs_()
    weight[4].abs_().neg_()
    weight[5] *= 1e-30
    weight.requires_grad_()
    clip = random_clip(scheme, 6, 64, torch.float32)
    out = clip(weight)
    assert torch.equal(out, stored(weight.detach(), clip, scheme, torch.float32))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert clip.logits.grad is not None
    assert clip.logits.grad.isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_inside_the_limits_get_the_gradient_as_it_is(name: str) -> None:
    scheme = weights_of(name, 64)
    weight = gaussian(8, 64, seed=1).requires_grad_()
    factors = torch.full((1 if scheme.is_symmetric else 2, 8, group_count(64, scheme.group_size)), 0.6)
    grad = gaussian(8, 64, seed=2)
    round_weight(weight, scheme, torch.float32, factors).backward(grad)
    assert weight.grad is not None
    width = 64 if scheme.group_size == -1 else scheme.group_size
    low, high = (end.repeat_interleave(width, 1)[:, :64] * 0.6 for end in reach(weight.detach(), scheme))
    inside = (weight > low) & (weight < high)
    assert 0.3 < float(inside.float().mean()) < 0.99
    assert torch.equal(weight.grad[inside], grad[inside])
    moved = (weight.grad[~inside] != 0).reshape(-1)  # the extremes alone, which the limits follow
    assert 0 < int(moved.sum()) <= 2 * factors.shape[1] * factors.shape[2]


def recorded(weight: Tensor, factors: Tensor | None, scheme: WeightScheme) -> Tensor:
    """``weight`` of one group per row, limited and rounded by steps that are recorded; right in its gradients alone."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    half = 2 ** (scheme.bits - 1)
    below, above = (-1.0, 1.0) if scheme.levels == "nf4" else (-half - 0.5, half - 0.5)
    if scheme.is_symmetric:
        scale = torch.maximum(low / below, high / above)
        low, high = scale * below, scale * above
    if factors is not None:
        low, high = low * factors[0], high * factors[-1]
    scale = high / above if scheme.is_symmetric else (high - low) / 2**scheme.bits
    kept = weight if factors is None else torch.minimum(torch.maximum(weight, low), high)
    stored = rtn.quantize(kept.detach(), scheme, torch.float32, rtn.Config())
    levels = ((stored.dequantize() - kept) / stored.scale).detach()
    return kept + scale * levels


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("name", ["W2A16GC", "W3SA16GC", "W4ZA16GC", "WNF4A16GC"])
def test_gradients_are_those_of_the_same_steps_recorded(name: str, limited: bool) -> None:
    scheme = weights_of(name, 40)
    weight, grad = gaussian(12, 40, seed=1), gaussian(12, 40, seed=2)
    weight[0, ::2] = weight[0].amax() + 1  # several are the largest one
    weight[1].abs_()
    clip = random_clip(scheme, 12, 40, torch.float32)

    def outcome(limit: Callable[[Tensor, Tensor | None], Tensor]) -> list[Tensor]:
        source = weight.clone().requires_grad_()
        factors = clip.logits.detach().sigmoid().requires_grad_()
        result = limit(source, factors if limited else None)
        return list(torch.autograd.grad(result, [source, factors] if limited else [source], grad))

    found = outcome(lambda source, factors: round_weight(source, scheme, torch.float32, factors))
    want = outcome(lambda source, factors: recorded(source, factors, scheme))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["W3SA16GC", "WNF4A16GC"])
def test_the_slope_of_clipped_weights_is_the_true_one(name: str) -> None:
    """Weights of one size: all are cut off, and move with the limit."""
    scheme = weights_of(name, 32)
    weight = gaussian(4, 32, seed=1).sign() * 2
    clip = Clip(torch.full((1, 4, 1), 0.5), scheme, torch.float32)
    grad = gaussian(4, 32, seed=2)
    clip(weight).backward(grad)
    assert clip.logits.grad is not None
    step = 1e-2
    with torch.no_grad():
        clip.logits += step
        above = clip(weight)
        clip.logits -= 2 * step
        below = clip(weight)
    slope = ((above - below) / (2 * step) * grad).sum(1)
    torch.testing.assert_close(clip.logits.grad.flatten(), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["W2A16G64", "W2SA16G64", "W3A16G64", "WNF4A16G64"])
def test_gradients_find_what_the_search_finds(name: str) -> None:
    """From 0.98 of the range down to the limits that suit Gaussian weights with an outlier in every group."""
    scheme = weights_of(name, 128)
    weight = gaussian(16, 128, seed=1)
    weight[:, ::64] = 8 * weight[:, ::64].sign()
    shape = 1 if scheme.is_symmetric else 2, 16, 2
    clip = Clip(torch.ones(shape), scheme, torch.float32)

    def error(out: Tensor) -> Tensor:
        return (out - weight)[:, 1:64].square().sum()  # whatever the outliers become

    before = float(error(clip(weight).detach()))
    importance = torch.ones(128)
    importance[::64] = 0
    searched = search_factors(weight, scheme, torch.float32, importance)
    best = float(error(Clip(searched, scheme, torch.float32)(weight).detach()))
    optimiser = torch.optim.Adam(clip.parameters(), lr=0.1)
    for _ in range(120):
        optimiser.zero_grad()
        error(clip(weight)).backward()
        optimiser.step()
    assert best < 0.8 * before
    assert float(error(clip(weight).detach())) < 1.1 * best


@pytest.mark.parametrize("name", SCHEMES)
def test_the_search_is_no_worse_than_no_limits(name: str) -> None:
    scheme = weights_of(name, 100)
    weight, importance = gaussian(24, 100, seed=1), gaussian(100, seed=2).exp()
    factors = search_factors(weight, scheme, torch.float32, importance)
    assert factors.shape == (1 if scheme.is_symmetric else 2, 24, group_count(100, scheme.group_size))
    found = round_weight(weight, scheme, torch.float32, factors)
    plain = rounded(weight, scheme, torch.float32)
    before, after = (((out - weight).square() * importance).sum(1) for out in (plain, found))
    assert (after <= before * (1 + 1e-6)).all()
    if scheme.bits == 2:
        assert float(after.sum()) < 0.97 * float(before.sum())


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_are_changed_rounded_and_shared() -> None:
    activations = Scheme.parse("W4A4").activations
    assert activations is not None
    hook = InputRounding(activations)
    x, t, z = gaussian(3, 7, 16, seed=1), gaussian(16, seed=2).exp(), gaussian(16, seed=3)
    hook.scale, hook.shift = t, z
    one, rest = hook(nn.Identity(), (x,)), hook(nn.Identity(), (x,))
    assert one[0] is rest[0]
    assert torch.equal(one[0], fake_quantize((x - z) * t, activations))
    hook.scale = hook.shift = None
    hook.forget()
    assert torch.equal(hook(nn.Identity(), (x,))[0], fake_quantize(x, activations))
    assert InputRounding(None)(nn.Identity(), (x,))[0] is x


def test_a_matrix_and_a_clip_of_inputs() -> None:
    """Behind scale and shift, as at run time, also where products are done in bfloat16."""
    activations = Scheme.parse("W4A4Z").activations
    assert activations is not None
    hook = InputRounding(activations)
    x, t = gaussian(3, 7, 24, seed=1), gaussian(24, seed=2).exp()
    hook.scale, hook.clip = t, torch.tensor([0.7, 0.9])
    hook.op = LayerInputs(left=gaussian(4, 4, seed=3), right=gaussian(6, 6, seed=4))
    stored = LayerInputs(scale=t, left=hook.op.left, right=hook.op.right, clip=hook.clip)
    want = transform_input(x, stored, activations)
    assert torch.equal(hook(nn.Identity(), (x,))[0], want)
    hook.forget()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hook(nn.Identity(), (x,))[0], want)


def test_gradients_pass_the_rounding_of_inputs() -> None:
    hook = InputRounding(Scheme.parse("W4A4").activations)
    x, grad = gaussian(5, 16, seed=1).requires_grad_(), gaussian(5, 16, seed=4)
    hook.scale = gaussian(16, seed=2).exp().requires_grad_()
    hook(nn.Identity(), (x,))[0].backward(grad)
    torch.testing.assert_close(x.grad, grad * hook.scale.detach())
    torch.testing.assert_close(hook.scale.grad, (grad * x.detach()).sum(0))
