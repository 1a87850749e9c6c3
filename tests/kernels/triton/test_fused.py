"""Norms and gated activations to codes in Triton's interpreter.

Norms are held against those of transformers and PyTorch, to a digit; their codes against ``input_codes.quantize`` of
the very values that the kernel wrote, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from handmade import layer_format, layer_inputs
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import input_codes, reference
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import activation, fused
from quantkit.kernels.triton.fused import Activation, Norm, NormKind
from quantkit.recipe import ActivationScheme, Scheme

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS: list[NormKind] = ["llama", "gemma", "layer"]
EPS = 1e-3  # large enough to be missed


def scheme_of(text: str) -> ActivationScheme:
    activations = Scheme.parse(text).activations
    assert activations is not None
    return activations


def rows_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows from 0.01 to 100, around 0.3 of that: a lost epsilon and a lost mean show; the third is 0."""
    x = (torch.randn(rows, columns) + 0.3).mul(torch.logspace(-2, 2, rows)[:, None])
    x[2:3] = 0
    return x.to(dtype)


def norm_of(kind: NormKind, columns: int, dtype: torch.dtype) -> tuple[Norm, nn.Module]:
    """A norm as the kernel is given it, and the module that it stands for."""
    module: nn.Module
    if kind == "layer":
        module = nn.LayerNorm(columns, eps=EPS)
    else:
        module = (LlamaRMSNorm if kind == "llama" else Gemma2RMSNorm)(columns, eps=EPS)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.2)
    module.to(dtype).requires_grad_(False)
    return Norm(kind, module.weight, getattr(module, "bias", None), EPS), module


def normed(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):  # on CPUs PyTorch rounds on the way
        return F.layer_norm(x.double(), x.shape[-1:], module.weight.double(), module.bias.double(), EPS).to(x.dtype)
    y: Tensor = module(x)
    return y


def assert_a_digit_apart(got: Tensor, want: Tensor) -> None:
    """Numbers that differ at all are few, and neighbours; a float32 is some digits off."""
    assert got.dtype == want.dtype
    if want.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        return
    torch.testing.assert_close(got, want, rtol=2.1 * torch.finfo(want.dtype).eps, atol=1e-6)
    assert (got != want).float().mean() < 0.01


def check(got: InputCodes, want: InputCodes) -> None:
    """Equal bits; of rows whose step is NaN, codes and zero points mean nothing."""
    assert got.codes.dtype == torch.int8
    assert got.scale.dtype == torch.float32
    torch.testing.assert_close(got.scale, want.scale, rtol=0, atol=0, equal_nan=True)
    finite = want.scale[:, 0].isfinite()
    assert torch.equal(got.codes[finite], want.codes[finite])
    assert (got.zero_point is None) == (want.zero_point is None)
    if want.zero_point is not None and got.zero_point is not None:
        assert torch.equal(got.zero_point[finite], want.zero_point[finite])


def check_close(got: InputCodes, want: InputCodes) -> None:
    """Of values that are a digit apart: codes next to the middle of two may be the other one."""
    assert got.codes.shape == want.codes.shape
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-6, atol=0)
    assert (got.codes.int() - want.codes.int()).abs().max() <= 1
    assert (got.codes != want.codes).float().mean() < 0.01
    assert (got.zero_point is None) == (want.zero_point is None)
    if want.zero_point is not None and got.zero_point is not None:
        assert torch.equal(got.zero_point, want.zero_point)


def codes_of(y: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    return input_codes.quantize(reference.transform_input(y, inputs, None), scheme, inputs)


FORMATS = [
    ("A8", {}),
    ("A8Z", {"input_shift": True, "input_clip": True}),
    ("A4", {"input_scale": True}),
    ("A4Z", {"input_scale": True, "input_shift": True}),
    ("A8TS", {"input_scale": True}),
    ("A8ZTS", {}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scheme", "settings"), FORMATS)
def test_norms(interpreted_inputs, scheme, settings, kind, dtype):
    layer = layer_format(f"W8{scheme}", **settings)
    inputs = layer_inputs(layer, 200, dtype=dtype)
    norm, module = norm_of(kind, 200, dtype)
    x = rows_of(5, 200, dtype)
    assert layer.activations is not None
    got = fused.norm_quantize(x, norm, inputs, layer.activations, values=True)
    assert got.residual is None
    assert got.values is not None
    assert_a_digit_apart(got.values, normed(module, x))
    check(got.codes, codes_of(got.values, layer.activations, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_is_added_first(interpreted_inputs, kind, dtype):
    """Both with rows of their own distance; the sum is rounded before it is read."""
    norm, module = norm_of(kind, 96, dtype)
    wide, other = rows_of(6, 300, dtype).view(2, 3, 300), rows_of(6, 110, dtype).flip(0).view(2, 3, 110)
    x, residual = wide[..., 7:103], other[..., :96]
    got = fused.norm_quantize(x, norm, LayerInputs(), scheme_of("W8A8"), residual, values=True)
    assert got.residual is not None
    assert got.values is not None
    assert torch.equal(got.residual, x + residual)
    assert got.values.shape == x.shape
    assert_a_digit_apart(got.values, normed(module, x + residual))
    check(got.codes, codes_of(got.values, scheme_of("W8A8"), LayerInputs()))
    alone = fused.norm_quantize(x, norm, LayerInputs(), scheme_of("W8A8"), residual)
    assert alone.values is None
    check(alone.codes, got.codes)


@pytest.mark.parametrize("columns", [1, 2, 3, 63, 65, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_every_number_of_columns(interpreted_inputs, kind, columns):
    """Behind each row lie large numbers, which must not be read."""
    padded = torch.full((3, columns + 5), 1e4)
    padded[:, :columns] = rows_of(3, columns, torch.float32)
    x = padded[:, :columns]
    norm, module = norm_of(kind, columns, torch.float32)
    got = fused.norm_quantize(x, norm, LayerInputs(), scheme_of("W8A8Z"), values=True)
    assert got.values is not None
    assert_a_digit_apart(got.values, normed(module, x))
    check(got.codes, codes_of(got.values, scheme_of("W8A8Z"), LayerInputs()))


@pytest.mark.parametrize("rows", [0, 1, 3, 65])
def test_every_number_of_rows(interpreted_inputs, rows):
    norm, module = norm_of("llama", 24, torch.float16)
    x = rows_of(rows, 24, torch.float16)
    got = fused.norm_quantize(x, norm, LayerInputs(), scheme_of("W8A8"), x.flip(0), values=True)
    product = fused.gated_quantize(x, x.flip(0), "silu", LayerInputs(), scheme_of("W8A8"))
    assert got.values is not None
    assert got.residual is not None
    assert got.values.shape == got.residual.shape == got.codes.codes.shape == product.codes.shape == (rows, 24)
    assert got.codes.scale.shape == product.scale.shape == (rows, 1)
    if rows:
        assert_a_digit_apart(got.values, normed(module, x + x.flip(0)))
        check(got.codes, codes_of(got.values, scheme_of("W8A8"), LayerInputs()))


def act(function: Activation, gate: Tensor) -> Tensor:
    return F.silu(gate) if function == "silu" else F.gelu(gate, approximate="tanh")


@pytest.mark.parametrize("part", [256, 64], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("function", "scheme", "settings"),
    [(("silu", "gelu")[number % 2], *one) for number, one in enumerate([*FORMATS, *FORMATS[:1]])],
)
def test_gated(interpreted_inputs, monkeypatch, function, scheme, settings, dtype, part):
    """Gates from where they are shut to where they are open, in rows of their own distance."""
    monkeypatch.setattr(activation, "WHOLE_COLUMNS", part)
    monkeypatch.setattr(activation, "_PART_COLUMNS", part)
    layer = layer_format(f"W8{scheme}", **settings)
    inputs = layer_inputs(layer, 200, dtype=dtype)
    gate, up = rows_of(5, 210, dtype).mul(0.3)[:, 4:204], rows_of(5, 220, dtype).flip(1)[:, :200]
    assert layer.activations is not None
    got = fused.gated_quantize(gate, up, function, inputs, layer.activations)
    check_close(got, codes_of(act(function, gate) * up, layer.activations, inputs))


@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_gates_at_their_ends(interpreted_inputs, function):
    """A gate so low that its exponential is infinite lets nothing through; what is not finite breaks its row."""
    gate = torch.tensor([[-200.0, 0, 200, 1], [float("nan"), 1, 1, 1], [float("inf"), 1, 1, 1], [1, 1, 1, 1]])
    scheme = scheme_of("W8A8")
    got = fused.gated_quantize(gate, torch.ones(4, 4), function, LayerInputs(), scheme)
    check(got, codes_of(act(function, gate), scheme, LayerInputs()))
    assert got.scale.isnan().flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["A8", "A8ZTS"])
def test_what_is_not_finite_breaks_its_row(interpreted_inputs, kind, scheme):
    layer = layer_format(f"W8{scheme}")
    assert layer.activations is not None
    inputs = layer_inputs(layer, 50)
    norm, _ = norm_of(kind, 50, torch.float32)
    x = rows_of(4, 50, torch.float32)
    x[1, 40] = float("nan")
    x[3, 2] = float("inf")
    got = fused.norm_quantize(x, norm, inputs, layer.activations)
    assert got.codes.scale.isnan().flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("scheme", ["A4", "A4Z"])
def test_two_codes_to_a_byte(interpreted_inputs, scheme):
    norm, _ = norm_of("gemma", 70, torch.float32)
    x, activations = rows_of(3, 70, torch.float32), scheme_of(f"W8{scheme}")
    for packed, plain in (
        [fused.norm_quantize(x, norm, LayerInputs(), activations, packed=two).codes for two in (True, False)],
        [fused.gated_quantize(x, x, "silu", LayerInputs(), activations, packed=two) for two in (True, False)],
    ):
        assert packed.codes.shape == (3, 35)
        check(packed._replace(codes=activation.unpack(packed.codes)), plain)


@pytest.mark.parametrize(
    ("scheme", "inputs", "columns", "packed", "reason"),
    [
        ("W8A8T", LayerInputs(), 64, False, "for ranges of single tokens, not of a whole tensor"),
        ("W8A8B32", LayerInputs(), 64, False, "for one scale per token, not per 32 channels"),
        ("W8A8", LayerInputs(matrix=torch.eye(64)), 64, False, "for inputs that no matrix is applied to, not dense"),
        ("W8A8", LayerInputs(), 64, True, "two codes of 8 bits of 64 columns do not fill bytes"),
        ("W8A4", LayerInputs(), 63, True, "two codes of 4 bits of 63 columns do not fill bytes"),
    ],
)
def test_says_what_it_does_not_take(scheme, inputs, columns, packed, reason):
    x, norm = torch.zeros(1, columns), norm_of("llama", columns, torch.float32)[0]
    with pytest.raises(ValueError, match=reason):
        fused.norm_quantize(x, norm, inputs, scheme_of(scheme), packed=packed)
    with pytest.raises(ValueError, match=reason):
        fused.gated_quantize(x, x, "silu", inputs, scheme_of(scheme), packed)


def test_norms_of_longer_rows_are_not_taken(monkeypatch):
    monkeypatch.setattr(activation, "WHOLE_COLUMNS", 32)
    with pytest.raises(ValueError, match="for rows of up to 32 columns, not 33"):
        fused.norm_quantize(
            torch.zeros(1, 33), norm_of("llama", 33, torch.float32)[0], LayerInputs(), scheme_of("W8A8")
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_operators_have_shapes_without_data_and_pass_opcheck(interpreted_inputs, symmetric):
    x, ones = rows_of(2, 32, torch.float32), torch.ones(32)
    before = (ones, None, None, None, None, 8, symmetric, False)
    norm = (x, x.clone(), ones, None, EPS, "llama", *before, symmetric)
    torch.library.opcheck(torch.ops.quantkit.norm_codes.default, norm)
    torch.library.opcheck(torch.ops.quantkit.gated_codes.default, (x, x.clone(), "silu", *before))
