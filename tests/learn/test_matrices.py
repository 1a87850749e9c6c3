"""Learned matrices have the inverse that is claimed, and start where they should."""

from __future__ import annotations

import pytest
import torch
from looked import gaussian
from torch import Tensor

from quantkit.learn.matrices import Matrix, Parameterisation, Start, cayley, start_matrix

FORMS: list[Parameterisation] = ["direct", "svd"]
STARTS: list[Start] = ["balanced", "hadamard", "haar", "cayley"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scattered(parameterisation: Parameterisation, heads: int, size: int, amount: float = 1.0) -> Matrix:
    starts = torch.stack([start_matrix("haar", size, generator(n)) for n in range(heads)])
    matrix = Matrix(starts, parameterisation)
    for number, parameter in enumerate(matrix.parameters()):
        parameter.data += amount * gaussian(*parameter.shape, seed=number) * size**-0.5
    return matrix


def far_from_one(one: Tensor, other: Tensor) -> float:
    product = one.double() @ other.double().mT
    return float((product - torch.eye(one.shape[-1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("parameterisation", FORMS)
def test_the_inverse_is_one(parameterisation: Parameterisation) -> None:
    matrix = scattered(parameterisation, 3, 12)
    value, undo = matrix()
    assert float(torch.linalg.cond(value).min()) > 1.5
    assert far_from_one(value, undo) < 1e-5
    assert value.dtype == torch.float32
    value, undo = matrix.double()()
    if parameterisation == "direct":  # the start of the other form stays as it was: float32, and so not orthogonal
        assert far_from_one(value, undo) < 1e-12


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("parameterisation", FORMS)
def test_training_begins_at_the_start(parameterisation: Parameterisation, kind: Start) -> None:
    start = torch.stack([start_matrix(kind, 20, generator(n)) for n in range(2)])
    value, undo = Matrix(start, parameterisation)()
    torch.testing.assert_close(value, start, rtol=0, atol=1e-6)
    torch.testing.assert_close(undo, start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parameterisation", FORMS)
def test_it_may_begin_behind_a_stretch(parameterisation: Parameterisation) -> None:
    root = gaussian(12, 12, seed=3).double()
    root = torch.linalg.matrix_exp((root + root.mT) / 20)
    start = torch.stack([start_matrix("balanced", 12, generator(n)) for n in range(2)])
    value, undo = Matrix(start, parameterisation, root)()
    torch.testing.assert_close(value, (root @ start.double()).float(), rtol=1e-5, atol=1e-5)
    assert far_from_one(value, undo) < 1e-5


def test_a_stretch_to_begin_with_has_bounds() -> None:
    value, undo = Matrix(torch.eye(4)[None], "svd", torch.diag(torch.tensor([1e-9, 0.5, 2.0, 1e9])).double())()
    assert float(value.max()) == pytest.approx(100**0.45, rel=1e-3)
    assert far_from_one(value, undo) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 13, 20, 24, 64])
@pytest.mark.parametrize("kind", STARTS)
def test_starts_are_orthogonal(kind: Start, size: int) -> None:
    start = start_matrix(kind, size, generator())
    assert far_from_one(start, start) < 1e-5
    again, other = start_matrix(kind, size, generator()), start_matrix(kind, size, generator(1))
    assert torch.equal(start, again)
    assert size == 1 or not torch.equal(start, other)
    if kind == "hadamard":  # nothing stands out: sqrt(2 / n) at most, 1 / sqrt(n) where there is a Hadamard matrix
        bound = 1.0 if size in (1, 2, 20, 64) else 2**0.5
        assert float(start.abs().max()) <= bound * size**-0.5 * (1 + 1e-5)


def test_no_direction_is_stretched_too_far() -> None:
    matrix = scattered("svd", 2, 8, amount=1e3)
    value, undo = matrix()
    assert value.isfinite().all()
    assert undo.isfinite().all()
    assert 50 < float(torch.linalg.cond(value).max()) < 101


def test_cayley_is_orthogonal_and_differentiable() -> None:
    entries = gaussian(2, 7, 7).double()
    assert far_from_one(cayley(entries), cayley(entries)) < 1e-12
    assert torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))
    assert torch.autograd.gradcheck(cayley, entries.requires_grad_())


def test_what_has_no_inverse_is_no_number() -> None:
    """So that a loss of it is none, and the step is not taken."""
    _, undo = Matrix(torch.zeros(1, 4, 4), "direct")()
    assert undo.isnan().all()
