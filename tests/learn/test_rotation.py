"""A rotation learned from samples: orthogonal, better on samples that it has not seen, and never worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.kernels.reference import fake_quantize
from quantkit.learn.rotation import learn_rotation
from quantkit.recipe import ActivationScheme, Scheme


def scheme(name: str = "W4A4") -> ActivationScheme:
    found = Scheme.parse(name).activations
    assert found is not None
    return found


def samples(count: int = 600, parts: int = 1, size: int = 16) -> Tensor:
    """A few directions, none of them a channel, stand out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, parts, size, generator=generator)
    return x + 6 * torch.randn(count, parts, 2, generator=generator) @ torch.randn(2, size, generator=generator)


def error(x: Tensor, matrix: Tensor) -> float:
    turned = (x @ matrix.float()).flatten(1)
    lost = (fake_quantize(turned, scheme()) - turned).square().sum(1) / turned.square().sum(1)
    return float(lost.mean())


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_less_is_lost_on_other_samples(keeps_mean: bool) -> None:
    x = samples(1000)
    found = learn_rotation(x[:600], scheme(), 60, 0, keeps_mean=keeps_mean)
    one, ones = torch.eye(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(found.matrix @ found.matrix.mT, one, rtol=0, atol=1e-12)
    assert torch.allclose(ones @ found.matrix, ones, rtol=0, atol=1e-12) == keeps_mean
    assert found.after < 0.9 * found.before
    assert error(x[600:], found.matrix) < 0.9 * error(x[600:], one)
    assert error(x[7:600:8], found.matrix) == pytest.approx(found.after, rel=1e-5)
    assert error(x[7:600:8], one) == pytest.approx(found.before, rel=1e-5)


def test_parts_of_a_row_share_a_matrix_and_a_grid() -> None:
    x = samples(parts=3)
    found = learn_rotation(x, scheme(), 40, 0)
    assert found.matrix.shape == (16, 16)
    assert error(x[7::8], found.matrix) == pytest.approx(found.after, rel=1e-5)
    assert found.after < found.before


def test_the_same_again_and_in_inference_mode() -> None:
    first = learn_rotation(samples(), scheme(), 10, 3)
    with torch.inference_mode():
        again = learn_rotation(samples(), scheme(), 10, 3)
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, learn_rotation(samples(2000), scheme(), 10, 4).matrix)
    assert not again.matrix.is_inference()


@pytest.mark.parametrize("x", [torch.zeros(20, 1, 8), torch.empty(0, 1, 8), torch.ones(1, 1, 8)], ids=len)
def test_nothing_to_learn_from(x: Tensor) -> None:
    found = learn_rotation(x, scheme(), 5, 0)
    assert found.matrix.isfinite().all()
    assert found.after <= found.before
    torch.testing.assert_close(found.matrix @ found.matrix.mT, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["W4A8", "W8A8TS", "W4A4G8", "W8A8ZTS"])
def test_other_grids(name: str) -> None:
    found = learn_rotation(samples(), scheme(name), 20, 0)
    assert found.after < found.before
