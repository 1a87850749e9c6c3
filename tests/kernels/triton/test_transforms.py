"""Kronecker products and Hadamard matrices in Triton's interpreter, against float64.

bfloat16 is multiplied as float32 here, which holds the same numbers; that compiled kernels multiply it on the matrix
units is what test_activation_compile.py looks at.
"""

from __future__ import annotations

import pytest
import torch
from handmade import layer_format
from random_layers import relative_error
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import hadamard, input_codes, online
from quantkit.kernels.triton import activation, activation_report, compat, configs, transforms
from quantkit.recipe import ActivationScheme

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BEFORE_ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2e-5}
"""Error of a number, as a share of the largest of its row, before it is rounded to the dtype."""


def kronecker(left: int, right: int, dtype: torch.dtype, changed: bool = True) -> LayerInputs:
    """No factor is symmetric or orthogonal: one transposed, or taken for the other, shows."""
    return LayerInputs(
        scale=(torch.rand(left * right) + 0.5).to(dtype) if changed else None,
        shift=torch.randn(left * right).to(dtype) if changed else None,
        left=(torch.randn(left, left) / left**0.5).to(dtype),
        right=(torch.randn(right, right) / right**0.5).to(dtype),
    )


def signs(columns: int) -> LayerInputs:
    return LayerInputs(signs=torch.where(torch.rand(columns) < 0.5, -1, 1).to(torch.int8))


def rows_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) + 0.2).mul(torch.logspace(-1, 2, rows)[:, None]).to(dtype)


def changed(x: Tensor, inputs: LayerInputs) -> Tensor:
    """Before the matrix, as the reference rounds it."""
    x = x if inputs.scale is None else x * inputs.scale
    return x if inputs.shift is None else x + inputs.shift


def exact(x: Tensor, inputs: LayerInputs) -> Tensor:
    """float64, by matrices written out."""
    v = changed(x, inputs).double()
    if inputs.signs is not None:
        columns = hadamard.multiply(torch.eye(x.shape[-1], dtype=torch.float64))  # rows of the result: H @ e
        return (v * inputs.signs) @ columns * x.shape[-1] ** -0.5
    assert inputs.left is not None
    assert inputs.right is not None
    return v @ torch.kron(inputs.left.double(), inputs.right.double())


def check(x: Tensor, inputs: LayerInputs) -> None:
    y = transforms.apply(x, inputs)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    want = exact(x, inputs).view(y.shape)
    kind = torch.finfo(x.dtype)
    largest = want.abs().amax(dim=-1, keepdim=True)
    smallest_half = kind.tiny * kind.eps / 2
    bound = want.abs() * (kind.eps / 2) + largest * BEFORE_ROUNDING[x.dtype] + smallest_half
    assert ((y.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("left", "right"), [(1, 7), (5, 6), (16, 16), (20, 33), (28, 32), (3, 100)])
def test_kronecker_product(interpreted_inputs, left, right, dtype):
    check(rows_of(3, left * right, dtype), kronecker(left, right, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("left", "right"), [(130, 12), (7, 150), (24, 136)])
def test_kronecker_product_in_columns(interpreted_inputs, left, right, dtype):
    """Rows that no program holds: blocks of columns, of V and of the result, that are short; left filled up to 256."""
    assert not transforms.tile(left, right, "sm_90").whole
    check(rows_of(2, left * right, dtype), kronecker(left, right, dtype))


@pytest.mark.parametrize("columns", activation_report.COLUMNS)
def test_sides_of_models(interpreted_inputs, columns):
    """The sizes that are compiled, as they are split for FlatQuant."""
    left, right = online.kronecker_split(columns)
    inputs = kronecker(left, right, torch.float32)
    x = rows_of(1, columns, torch.float32)
    assert transforms.unsuited(inputs, torch.bfloat16, columns) is None
    assert relative_error(transforms.apply(x, inputs), online.apply(changed(x, inputs).double(), inputs)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("columns", [16, 64, 192, 320, 896])
def test_hadamard(interpreted_inputs, columns, dtype):
    check(rows_of(2, columns, dtype), signs(columns))


@pytest.mark.parametrize("columns", [344 * 4, 148 * 8])
def test_hadamard_of_a_large_base(interpreted_inputs, columns):
    """A base of 344, which is filled up to 512."""
    inputs = signs(columns)
    x = rows_of(1, columns, torch.float32)
    assert relative_error(transforms.apply(x, inputs), online.apply(x.double(), inputs)) < 1e-6


@pytest.mark.parametrize("columns", [64, 128, 896, 1536, 4096, 5120, 11008, 14336, 18944, 27648, 28672])
def test_hadamard_matrix_is_a_kronecker_product(columns):
    left, right = transforms._hadamard_factors(columns, torch.float32, torch.device("cpu"))
    assert (len(left), len(right)) == transforms.hadamard_sides(columns)
    x = torch.randint(-9, 9, (1, columns)).float()
    assert torch.equal((left.mT @ x.view(len(left), len(right)) @ right).view(1, -1), hadamard.multiply(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("W8A8", {}), ("W8A4Z", {}), ("W8A4", {"clip": True}), ("W8A8ZTS", {"static": True}), ("W8A8T", {})],
)
@pytest.mark.parametrize("kind", ["kronecker", "columns", "hadamard"])
def test_codes_are_those_of_the_reference(interpreted_inputs, kind, scheme, settings, dtype):
    """But where the result lies next to the middle of two; of a lost zero point or clip, most would differ."""
    activations = layer_format(scheme).activations
    assert activations is not None
    inputs = {"kronecker": lambda: kronecker(12, 20, dtype), "columns": lambda: kronecker(6, 140, dtype),
              "hadamard": lambda: signs(192)}[kind]()  # fmt: skip
    inputs = LayerInputs(
        **{name: getattr(inputs, name) for name in ("scale", "shift", "signs", "left", "right")},
        clip=torch.tensor([0.6, 0.8], dtype=dtype) if "clip" in settings else None,
        static_scale=torch.tensor([0.05], dtype=dtype) if "static" in settings else None,
        static_zero_point=torch.tensor([-3], dtype=torch.int8) if "static" in settings else None,
    )
    columns = {"kronecker": 240, "columns": 840, "hadamard": 192}[kind]
    x = rows_of(3, columns, dtype)
    got = transforms.quantize(x, activations, inputs)
    want = input_codes.quantize(online.apply(changed(x, inputs), inputs), activations, inputs)
    off = (got.codes.int() - want.codes.int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) < 4e-3  # 3 of the fewest
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
    assert (got.zero_point is None) == (want.zero_point is None)
    if got.zero_point is not None and want.zero_point is not None:
        torch.testing.assert_close(got.zero_point, want.zero_point, rtol=0, atol=1)


def test_one_kernel_gives_the_codes_of_two(interpreted_inputs):
    """Rounded like the result of ``apply``, bit for bit."""
    for dtype in DTYPES:
        inputs, scheme = kronecker(12, 20, dtype), ActivationScheme(bits=8, symmetric=False)
        x = rows_of(4, 240, dtype)
        y = transforms.apply(x, inputs)
        for one, two in zip(transforms.quantize(x, scheme, inputs), input_codes.quantize(y, scheme, LayerInputs()),
                            strict=True):  # fmt: skip
            assert one is not None
            assert torch.equal(one, two)


def test_second_product_keeps_what_16_bits_lose(interpreted_inputs):
    """A left factor that makes large numbers of small differences, a right one that takes the large part off again."""
    for dtype, bound in ((torch.float16, 1e-3), (torch.bfloat16, 6e-3)):
        right = torch.eye(32)
        right[0, 1:] = -1
        x = torch.ones(1, 16 * 32).mul(255).to(dtype)
        x.view(16, 32)[0, 1:] = 254
        inputs = LayerInputs(left=torch.ones(16, 16, dtype=dtype), right=right.to(dtype))
        y = transforms.apply(x, inputs).double()
        assert relative_error(y, exact(x, inputs)) < bound


def test_half_does_not_overflow_between_the_products(interpreted_inputs):
    inputs = LayerInputs(left=torch.ones(16, 16).half(), right=(torch.eye(16) / 1024).half())
    for size in (6e4, 1e-3):
        check(torch.full((2, 256), size).half() * torch.tensor([[1.0], [0.5]]).half(), inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("left", "right"), [(12, 20), (4, 140)])
def test_what_is_not_finite_stays_in_its_row(interpreted_inputs, left, right, bad):
    for dtype in (torch.float16, torch.float32):
        inputs = kronecker(left, right, dtype)
        x = rows_of(3, left * right, dtype)
        x[1, -1] = bad
        got = transforms.quantize(x, ActivationScheme(), inputs)
        assert got.scale.isnan().flatten().tolist() == [False, True, False]
        assert not transforms.apply(x, inputs)[1].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 17, 65])
def test_every_number_of_rows(interpreted_inputs, rows):
    check(rows_of(rows, 48, torch.float16), kronecker(6, 8, torch.float16))


def test_two_codes_to_a_byte(interpreted_inputs):
    scheme = ActivationScheme(bits=4)
    for inputs, columns in ((kronecker(5, 22, torch.float32), 110), (signs(192), 192),
                            (kronecker(2, 140, torch.float32), 280)):  # fmt: skip
        x = rows_of(3, columns, torch.float32)
        packed = transforms.quantize_packed(x, scheme, inputs)
        assert packed.codes.shape == (3, columns // 2)
        assert torch.equal(activation.unpack(packed.codes), transforms.quantize(x, scheme, inputs).codes)
    with pytest.raises(ValueError, match="two codes of 4 bits of 5 columns do not fill bytes"):
        transforms.quantize_packed(rows_of(3, 110, torch.float32), scheme, kronecker(22, 5, torch.float32))


def test_shapes_and_strides_of_the_input(interpreted_inputs):
    inputs = kronecker(6, 8, torch.float16)
    wide = rows_of(6, 100, torch.float16).view(2, 3, 100)
    for x in (wide[..., :48], wide[..., 1:49], wide[..., ::2][..., :48], wide.transpose(0, 1)[..., 3:51]):
        check(x, inputs)
    assert transforms.apply(wide[:0, :, :48], inputs).shape == (0, 3, 48)
    assert transforms.quantize(wide[:0, :, :48], ActivationScheme(), inputs).codes.shape == (0, 48)


def test_operators_have_shapes_without_data_and_pass_opcheck(interpreted_inputs):
    inputs = kronecker(4, 6, torch.float32)
    before = (rows_of(2, 24, torch.float32), inputs.scale, inputs.shift, None, inputs.left, inputs.right)
    torch.library.opcheck(torch.ops.quantkit.transform_input.default, before)
    after = (None, None, None, 8, False, False, False)
    torch.library.opcheck(torch.ops.quantkit.transform_input_codes.default, before + after)


@pytest.mark.parametrize(
    ("inputs", "columns", "dtype", "reason"),
    [
        (kronecker(4, 6, torch.float16), 24, torch.float16, None),
        (kronecker(4, 6, torch.float32), 24, torch.float32, "for half and bfloat16 models, not float32"),
        (LayerInputs(), 24, torch.float16, "for Kronecker products and Hadamard matrices, not for none"),
        (LayerInputs(left=torch.eye(600), right=torch.eye(2)), 1200, torch.float16,
         "for factors of up to 512 and 1024, not 600 and 2"),
        (signs(13696), 13696, torch.float16, "13696 columns have no Hadamard matrix"),
        (signs(28672), 28672, torch.bfloat16, None),
    ],
)  # fmt: skip
def test_says_what_it_does_not_take(monkeypatch, inputs, columns, dtype, reason):
    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("sm_90", 132))
    assert transforms.refuses(inputs, dtype, torch.device("cuda"), columns) == reason
    assert transforms.refuses(inputs, dtype, torch.device("cpu"), columns) == "for GPUs, not cpu"
