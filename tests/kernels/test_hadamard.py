import pytest
import torch
from torch import Tensor

from quantkit.kernels.hadamard import multiply, paley, split

# No construction of Paley's: the odd part gets the Hartley matrix.
UNKNOWN = (92, 116, 156, 172, 184, 188, 232, 236)
WIDTHS = {
    768: (12, 64), 896: (28, 32), 1152: (36, 32), 1408: (44, 32), 1536: (12, 128), 2048: (1, 2048), 2560: (20, 128),
    2880: (180, 16), 3072: (12, 256), 3584: (28, 128), 4096: (1, 4096), 4864: (76, 64), 5120: (20, 256),
    5632: (44, 128), 6144: (12, 512), 6656: (52, 128), 6912: (108, 64), 8192: (1, 8192), 8960: (140, 64),
    9216: (36, 256), 9728: (76, 128), 10240: (20, 512), 11008: (344, 32), 12288: (12, 1024), 12800: (100, 128),
    13824: (108, 128), 14336: (28, 512), 17408: (68, 256), 17920: (140, 128), 18432: (36, 512), 18944: (148, 128),
    21504: (84, 256), 22016: (344, 64), 24576: (12, 2048), 25600: (100, 256), 27648: (108, 256), 28672: (28, 1024),
    29568: (924, 32), 53248: (52, 1024),
}  # fmt: skip
"""Widths of hidden states, values and MLPs of published models -> (base, power of two)."""


def explicit(size: int) -> Tensor:
    """The matrix that ``multiply`` multiplies by, float64."""
    return multiply(torch.eye(size, dtype=torch.float64)).mT


def test_every_multiple_of_four_is_a_hadamard_matrix():
    found = []
    for size in [1, 2, *range(4, 257, 4)]:
        matrix = explicit(size)
        if split(size).kind == "hartley":
            found.append(size)
            continue
        whole = matrix.long()
        assert torch.equal(whole.double(), matrix)
        assert (whole.abs() == 1).all(), size
        assert torch.equal(whole @ whole.mT, size * torch.eye(size, dtype=torch.int64)), size
    assert tuple(found) == UNKNOWN


# Fields of p, p**2, p**3 and p**4 elements, both constructions.
@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 52, 100, 108, 140, 148, 164, 180, 244, 252, 340, 344, 500, 924])
def test_bases_are_orthogonal_in_integers(order):
    base = paley(order).double()
    assert (base.abs() == 1).all()
    assert torch.equal(base @ base.mT, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", WIDTHS)
def test_widths_of_published_models_are_exact(size):
    base, power = WIDTHS[size]
    assert split(size)[::2] == (base, power)
    assert split(size).kind != "hartley"
    x = torch.randint(-9, 10, (3, size), generator=torch.Generator().manual_seed(size)).double()
    y = multiply(x)
    assert torch.equal(y, y.round())
    assert torch.equal(multiply(y, transpose=True), size * x)
    assert torch.equal(y.square().sum(1), size * x.square().sum(1))
    assert not torch.equal(y, x)


@pytest.mark.parametrize(("base", "power"), [(12, 4), (20, 2), (28, 1), (1, 16)])
def test_is_the_kronecker_product_of_base_and_doubling(base, power):
    matrix = paley(base).double() if base > 1 else torch.ones(1, 1, dtype=torch.float64)
    doubled = torch.ones(1, 1, dtype=torch.float64)
    while len(doubled) < power:
        doubled = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), doubled)
    whole = torch.kron(matrix, doubled)
    x = torch.randn(2, 3, base * power, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(multiply(x), x @ whole.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(multiply(x, transpose=True), x @ whole, rtol=1e-12, atol=1e-12)
    assert base == 1 or not torch.equal(whole, whole.mT)  # so the two differ


@pytest.mark.parametrize("size", [3, 7, 10, 46, 92, 107, 2 * 107, 8 * 47])
def test_any_other_size_is_orthogonal_and_as_flat_as_a_wave(size):
    assert split(size).kind == "hartley"
    matrix = explicit(size)
    torch.testing.assert_close(matrix @ matrix.mT, size * torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
    assert matrix.abs().max() <= 2**0.5 + 1e-12
    torch.testing.assert_close(multiply(matrix, transpose=True), size * torch.eye(size).double(), rtol=0, atol=1e-9)


def test_the_transform_is_fast():
    assert split(4096).operations == 4096 * 12
    assert split(14336).operations == 14336 * (9 + 2 * 28)
    assert all(split(size).operations < 0.35 * size**2 for size in WIDTHS)
    assert split(4 * 1009).kind == "hartley"  # Paley's matrix would be there, as large as the linear


def test_gradients_also_behind_inference_mode():
    with torch.inference_mode():
        multiply(torch.randn(2, 36, dtype=torch.float64))  # makes the base
    for size in (36, 14, 8):
        x = torch.randn(2, size, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(multiply, (x,))


def test_orders_that_are_not_paleys_are_refused():
    for order in (2, 6, 92, 172):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
            paley(order)
