"""Gradients in closed form against those of the same steps, recorded."""

import pytest
import torch

from quantkit.kernels import reference
from quantkit.kernels.grid_gradient import gradients
from quantkit.recipe import ActivationScheme

GRIDS = {
    "symmetric": ActivationScheme(bits=4),
    "zero point": ActivationScheme(bits=4, symmetric=False),
    "tensor": ActivationScheme(bits=3, granularity="tensor"),
    "tensor, zero point": ActivationScheme(bits=3, granularity="tensor", symmetric=False),
    "group": ActivationScheme(bits=4, granularity="group", group_size=16),
    "group, zero point": ActivationScheme(bits=8, granularity="group", group_size=16, symmetric=False),
}


def nearest(codes):
    return codes + (codes.round() - codes).detach()


def recorded_rows(x, shares, scheme):
    """Every row of ``x`` rounded to its grid, step by step."""
    first, last, steps = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1, 2**scheme.bits - 1
    low = (x.amin(-1, keepdim=True) * shares[0]).clamp(max=0)
    high = (x.amax(-1, keepdim=True) * shares[1]).clamp(min=0)
    step = torch.maximum(-low, high) / (steps / 2) if scheme.symmetric else (high - low) / steps
    step = torch.where(step == 0, torch.finfo(x.dtype).eps, step)
    zero = 0 if scheme.symmetric else nearest((first - low / step).clamp(first, last))
    return (nearest((x / step + zero).clamp(first, last)) - zero) * step


def recorded(x, shares, scheme, grad):
    x, shares = x.clone().requires_grad_(), shares.clone().requires_grad_()
    if scheme.granularity == "tensor":
        rounded = recorded_rows(x.view(1, -1), shares, scheme).view(x.shape)
    elif scheme.granularity == "token":
        rounded = recorded_rows(x, shares, scheme)
    else:
        rounded = torch.cat([recorded_rows(part, shares, scheme) for part in x.split(scheme.group_size, -1)], -1)
    torch.testing.assert_close(reference.fake_quantize(x.detach(), scheme, clip=shares.detach()), rounded.detach())
    return torch.autograd.grad(rounded, (x, shares), grad)


def close(scheme, x, shares=(0.6, 0.8)):
    shares = torch.tensor(shares, dtype=x.dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found, want = gradients(x, shares, scheme, grad), recorded(x, shares, scheme, grad)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    return found


@pytest.mark.parametrize("name", GRIDS)
def test_as_recorded(name):
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_x, of_shares = close(GRIDS[name], x)
    assert of_x.shape == x.shape
    one_end = GRIDS[name].symmetric and GRIDS[name].granularity == "tensor"  # the one that is farther away
    assert int((of_shares != 0).sum()) == (1 if one_end else 2)


@pytest.mark.parametrize("name", GRIDS)
def test_tokens_of_one_sign_of_zeros_and_with_ties(name):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0], x[1], x[2] = 0, x[1].abs() + 0.1, -x[2].abs() - 0.1
    x[3, :7], x[3, 20:23] = 5, -5.5
    close(GRIDS[name], x)
    close(GRIDS[name], x, shares=(1.0, 1.0))


def test_what_is_not_wanted_is_none():
    x, shares = torch.randn(2, 8), torch.tensor([0.5, 0.5], requires_grad=True)
    rounded = reference.fake_quantize(x, GRIDS["symmetric"], clip=shares)
    rounded.sum().backward()
    assert shares.grad is not None
    assert x.grad is None
