"""The start of matrices is where both errors are least together."""

from __future__ import annotations

import pytest
import torch
from looked import gaussian
from torch import Tensor

from quantkit.learn import balance
from quantkit.learn.balance import balanced_roots


def sides(width: int) -> tuple[Tensor, Tensor]:
    """Inputs and weights with directions that are large, and correlated."""
    mix = gaussian(width, width, seed=1).double()
    inputs = gaussian(200, width, seed=2).double() @ (mix * gaussian(width, seed=3).double().mul(1.5).exp())
    weights = gaussian(64, width, seed=4).double() * gaussian(width, seed=5).double().exp()
    return inputs, weights


def roots(inputs: Tensor, weights: Tensor, left: int) -> tuple[Tensor, Tensor]:
    return balanced_roots([(inputs, 1.0)], [(weights, 1.0)], left)


def product(inputs: Tensor, weights: Tensor, left: Tensor, right: Tensor) -> float:
    matrix = torch.kron(left, right)  # x @ P, P = left (x) right
    return float((inputs @ matrix).square().sum() * (weights @ torch.linalg.inv(matrix).mT).square().sum())


def test_nothing_near_is_better() -> None:
    inputs, weights = sides(24)
    left, right = roots(inputs, weights, 4)
    least = product(inputs, weights, left, right)
    assert least < 0.3 * product(inputs, weights, torch.eye(4).double(), torch.eye(6).double())
    for seed in range(20):
        for amount in (0.02, 0.2):
            one, other = (torch.eye(n).double() + amount * gaussian(n, n, seed=seed).double() for n in (4, 6))
            assert product(inputs, weights, left @ one, right) > least * (1 - 1e-3)  # as far as it is damped
            assert product(inputs, weights, left, right @ other) > least * (1 - 1e-3)


def test_a_single_factor_is_the_geometric_mean() -> None:
    inputs, weights = sides(8)
    left, right = roots(inputs, weights, 1)
    assert left.tolist() == [[pytest.approx(1.0)]]
    mean = right @ right
    a, b = (m.mT @ m + 1e-3 * m.square().sum() / 8 * torch.eye(8) for m in (inputs, weights))  # as it is damped
    both = mean @ a @ mean
    torch.testing.assert_close(both / both.trace(), b / b.trace())  # G @ A @ G = B, up to a factor


def test_roots_are_symmetric_and_of_determinant_one() -> None:
    for root in roots(*sides(24), 4):
        assert root.dtype == torch.float64
        torch.testing.assert_close(root, root.mT)
        assert float(torch.linalg.eigvalsh(root).min()) > 0
        assert float(torch.linalg.det(root)) == pytest.approx(1.0)


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = roots(*sides(24), 4)
    monkeypatch.setattr(balance, "_CHUNK", 7 * 24)
    for one, other in zip(whole, roots(*sides(24), 4), strict=True):
        torch.testing.assert_close(one, other)


def test_matrices_are_scaled_and_taken_together() -> None:
    inputs, weights = sides(24)
    scale = gaussian(24, seed=6).double().exp()
    parts = [(weights[:20] * scale, scale), (weights[20:], 1.0)]
    for one, other in zip(roots(inputs, weights, 4), balanced_roots([(inputs, 1.0)], parts, 4), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", ["few tokens", "no signal", "no weights", "tiny", "huge"])
def test_whatever_there_is_roots_are_finite(case: str) -> None:
    inputs, weights = sides(24)
    inputs = {"few tokens": inputs[:1], "no signal": inputs * 0, "tiny": inputs * 1e-20, "huge": inputs * 1e20}.get(
        case, inputs
    )
    weights = weights * 0 if case == "no weights" else weights
    for root in roots(inputs, weights, 4):
        assert root.isfinite().all()
        assert float(torch.linalg.cond(root)) < 1e4
