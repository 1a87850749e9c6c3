"""Activations to codes in Triton's interpreter: bit for bit what ``input_codes.quantize`` says, bfloat16 included.

The interpreter is told apart there: it cuts float32 off instead of rounding it to bfloat16, so kernels round by
themselves. Of bfloat16 numbers below 2**-126 it reads another value; there are none here.
"""

from __future__ import annotations

import pytest
import torch
from handmade import layer_format, layer_inputs
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import input_codes, reference
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import activation, compat, configs
from quantkit.recipe import ActivationScheme, Scheme

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def scheme_of(text: str) -> ActivationScheme:
    activations = Scheme.parse(text).activations
    assert activations is not None
    return activations


def rows_of(rows: int, columns: int, dtype: torch.dtype, spread: float = 2.0) -> Tensor:
    """Rows from 10**-spread to 10**spread, not around 0; of some all numbers are positive, negative, the same, 0."""
    x = (torch.randn(rows, columns) + 0.3).mul(torch.logspace(-spread, spread, rows)[:, None])
    x[:, -1] *= 5  # the largest is often the last
    for row, change in enumerate([torch.abs, lambda x: -x.abs(), torch.zeros_like, lambda x: x[:1].expand_as(x)]):
        if row + 1 < rows:
            x[row + 1] = change(x[row + 1])
    x[x.abs() < 2e-38] = 0
    return x.to(dtype)


def expected(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    return input_codes.quantize(reference.transform_input(x, inputs, None), scheme, inputs)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("A8", {}),
        ("A8Z", {}),
        ("A4", {"input_scale": True}),
        ("A4Z", {"input_scale": True, "input_shift": True}),
        ("A6", {"input_clip": True}),
        ("A8Z", {"input_clip": True, "input_shift": True}),
        ("A8TS", {"input_scale": True}),
        ("A8ZTS", {}),
        ("A8T", {"input_scale": True, "input_clip": True}),
        ("A5ZT", {"input_shift": True}),
    ],
)
def test_bits_of_the_reference(interpreted_inputs, scheme, settings, dtype):
    layer = layer_format(f"W8{scheme}", **settings)
    assert layer.activations is not None
    inputs = layer_inputs(layer, 100, dtype=dtype)
    x = rows_of(7, 100, dtype)
    check(activation.quantize(x, layer.activations, inputs), expected(x, layer.activations, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_halves_go_to_even_codes(interpreted_inputs, dtype):
    """Steps of 1 by a static grid: every number with .5 is a tie; beyond the ends it is cut off."""
    x = (torch.arange(-280, 280) / 2).to(dtype)[None]
    inputs = LayerInputs(static_scale=torch.ones(1, dtype=dtype))
    codes = activation.quantize(x, scheme_of("W8A8TS"), inputs).codes
    assert torch.equal(codes.float(), x.float().clamp(-128, 127).round())
    assert {int(codes[0, 280 + 1]), int(codes[0, 280 + 3]), int(codes[0, 280 - 5])} == {0, 2, -2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_multiplying_by_one_over_the_step_is_dividing(dtype):
    """What the kernel relies on, for all pairs of significands; other exponents only move the result."""
    bits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    numbers = torch.arange(2 ** (bits - 1), 2**bits, dtype=torch.float32)
    assert torch.equal((numbers[:, None] / numbers).to(dtype), (numbers[:, None] * (1 / numbers)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_steps_from_the_smallest_to_the_largest(interpreted_inputs, dtype):
    spread = 4.0 if dtype == torch.float16 else 34.0
    x = rows_of(9, 40, dtype, spread)
    for scheme in (scheme_of("W8A8"), scheme_of("W8A4Z")):
        check(activation.quantize(x, scheme, LayerInputs()), expected(x, scheme, LayerInputs()))


@pytest.mark.parametrize("columns", [1, 2, 3, 31, 64, 65, 255, 896])
@pytest.mark.parametrize("scheme", ["A8", "A4Z"])
def test_every_number_of_columns(interpreted_inputs, scheme, columns):
    """Behind each row lie large numbers, which must not be read."""
    padded = torch.full((3, columns + 5), 1e4)
    padded[:, :columns] = rows_of(3, columns, torch.float32)
    x = padded[:, :columns]
    check(
        activation.quantize(x, scheme_of(f"W8{scheme}"), LayerInputs()),
        expected(x, scheme_of(f"W8{scheme}"), LayerInputs()),
    )


@pytest.mark.parametrize("rows", [1, 2, 17, 65])
def test_every_number_of_rows(interpreted_inputs, rows):
    x = rows_of(rows, 24, torch.float16)
    check(activation.quantize(x, scheme_of("W8A8"), LayerInputs()), expected(x, scheme_of("W8A8"), LayerInputs()))


@pytest.mark.parametrize("scheme", ["A8", "A8Z", "A8ZTS", "A8T"])
@pytest.mark.parametrize("columns", [65, 128, 200])
def test_rows_longer_than_a_program_holds(interpreted_inputs, monkeypatch, scheme, columns):
    """In parts of 32 columns, the last one short; the largest number in the first part or in the last."""
    monkeypatch.setattr(activation, "WHOLE_COLUMNS", 64)
    monkeypatch.setattr(activation, "_PART_COLUMNS", 32)
    layer = layer_format(f"W8{scheme}", input_scale=True, input_shift=True, input_clip=not scheme.endswith("S"))
    inputs = layer_inputs(layer, columns, dtype=torch.float16)
    x = rows_of(6, columns, torch.float16)
    x[5] = x[5].flip(0)
    assert layer.activations is not None
    check(activation.quantize(x, layer.activations, inputs), expected(x, layer.activations, inputs))


@pytest.mark.parametrize("scheme", ["A8", "A8Z", "A8TS", "A8T"])
@pytest.mark.parametrize("part", [64, 32], ids=["whole", "in parts"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_breaks_its_row(interpreted_inputs, monkeypatch, scheme, part, bad):
    """Or all rows, where they have one range; on a static grid infinity is only cut off."""
    monkeypatch.setattr(activation, "WHOLE_COLUMNS", part)
    monkeypatch.setattr(activation, "_PART_COLUMNS", part)
    layer = layer_format(f"W8{scheme}")
    assert layer.activations is not None
    inputs = layer_inputs(layer, 50)
    x = rows_of(3, 50, torch.float32)
    x[1, 40] = bad
    got = activation.quantize(x, layer.activations, inputs)
    check(got, expected(x, layer.activations, inputs))
    if scheme in ("A8", "A8Z"):
        assert got.scale.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("scheme", ["A4", "A4Z", "A3ZTS"])
@pytest.mark.parametrize("columns", [2, 66, 130])
def test_two_codes_to_a_byte(interpreted_inputs, monkeypatch, scheme, columns):
    monkeypatch.setattr(activation, "WHOLE_COLUMNS", 128)
    monkeypatch.setattr(activation, "_PART_COLUMNS", 64)
    layer = layer_format(f"W8{scheme}")
    assert layer.activations is not None
    inputs = layer_inputs(layer, columns)
    x = rows_of(5, columns, torch.float32)
    packed = activation.quantize_packed(x, layer.activations, inputs)
    assert packed.codes.shape == (5, columns // 2)
    check(packed._replace(codes=activation.unpack(packed.codes)), expected(x, layer.activations, inputs))
    assert (
        int(activation.unpack(torch.tensor([[0x1F]], dtype=torch.int8))[0, 0]) == -1
    )  # the even column is the low half


def test_what_does_not_fill_bytes_is_not_packed():
    for scheme, columns in (("W8A8", 64), ("W8A4", 63)):
        with pytest.raises(ValueError, match=f"of {columns} columns do not fill bytes"):
            activation.quantize_packed(torch.zeros(1, columns), scheme_of(scheme), LayerInputs())


def test_shapes_and_strides_of_the_input(interpreted_inputs):
    scheme = scheme_of("W8A8Z")
    wide = rows_of(6, 200, torch.float16).view(2, 3, 200)
    for x in (wide[..., :96], wide[..., 1:97], wide[..., ::2], wide[0, 0, :96], wide.transpose(0, 1)[..., 3:60]):
        check(activation.quantize(x, scheme, LayerInputs()), expected(x, scheme, LayerInputs()))
    nothing = activation.quantize(wide[:0], scheme, LayerInputs())
    assert nothing.codes.shape == (0, 200)
    assert nothing.scale.shape == (0, 1)


@pytest.mark.parametrize("scheme", ["A8", "A4Z"])
def test_operator_has_shapes_without_data_and_passes_opcheck(interpreted_inputs, scheme):
    numbers = activation.grid_numbers(scheme_of(f"W8{scheme}"))
    arguments = (rows_of(2, 32, torch.float32), torch.ones(32), None, None, None, None, *numbers, False)
    torch.library.opcheck(torch.ops.quantkit.input_codes.default, arguments)


@pytest.mark.parametrize(
    ("scheme", "dtype", "device", "reason"),
    [
        ("W8A8", torch.float16, "cpu", "for GPUs, not cpu"),
        ("W8A8B32", torch.float16, "cuda", "for one scale per token, not per 32 channels"),
        ("W8A8", torch.float64, "cuda", "for models of 16 or 32 bits, not float64"),
        ("W8A8", torch.bfloat16, "cuda", "for sm_80 and later, gfx90a, gfx942 and gfx950, not sm_75"),
        ("W8A8", torch.bfloat16, "cuda", None),
    ],
)
def test_says_what_it_does_not_take(monkeypatch, scheme, dtype, device, reason):
    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kind = "sm_75" if reason and "sm_75" in reason else "sm_90"
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device(kind, 132))
    assert activation.refuses(dtype, torch.device(device), scheme_of(scheme)) == reason
