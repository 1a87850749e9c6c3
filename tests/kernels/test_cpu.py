"""Torch's low-bit operators on CPUs against float64 and against the reference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from handmade import layer_format, layer_inputs, round_to_nearest
from torch import Tensor

from quantkit.formats.layer import LayerInputs, to_tensors
from quantkit.kernels import dispatch, input_codes, reference
from quantkit.kernels.cpu import int4, int8_weights
from quantkit.layers.quant_linear import QuantLinear
from quantkit.recipe import Scheme

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(
        int4._block() is None or not torch.cpu._is_vnni_supported(), reason="this processor runs the reference only"
    ),
]
WEIGHT_ONLY = [
    "W4A16G64", "W4A16G32", "W4A16G256", "W4A16G96", "W4A16G512", "W4A16GC", "W4ZA16G64", "W4ZA16GC", "W3ZA16G32",
    "W3SA16G64", "W2ZA16G64", "W2SA16GC", "W8A16", "W7ZA16GC", "W6SA16GC", "W5ZA16GC",
]  # fmt: skip
INTEGER = ["W8A8", "W8A8Z", "W4A8", "W4ZA8Z", "W4A4", "W6A6ZT", "W8A8TS", "W8A8ZTS", "W3ZA6ZTS", "W8A8T"]
SIZES = [(96, 128), (40, 100), (33, 200), (320, 544)]
"""(rows, columns) of the weight: whole blocks, and short ones of every kind; more than are unpacked at once."""
BFLOAT16 = 2**-8 / math.sqrt(3)
"""Rounding once to bfloat16 has a smaller error than this: relative, as a root mean square."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(
    scheme: str,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    mean: float | Tensor = 0.3,
) -> QuantLinear:
    """A random layer whose weights have a mean, so that zero points differ from the middle."""
    generator = torch.Generator().manual_seed(rows + columns)
    layer_fmt = layer_format(scheme)
    weight = torch.randn(rows, columns, generator=generator) + mean
    static = layer_fmt.activations is not None and not layer_fmt.activations.dynamic
    inputs = layer_inputs(layer_fmt, columns, dtype=dtype) if static else LayerInputs()
    tensors = to_tensors(round_to_nearest(weight, layer_fmt, dtype), layer_fmt, inputs)
    if bias:
        tensors["bias"] = torch.randn(rows, generator=generator).to(dtype)
    layer = QuantLinear(columns, rows, bias, layer_fmt, dtype)
    layer.load_state_dict(tensors)
    return layer


def exactly(x: Tensor, layer: QuantLinear) -> Tensor:
    """float64, of the stored codes and scales; activations are those of ``input_codes`` where they are rounded."""
    changed = x
    if layer.format.activations is not None:
        codes = input_codes.quantize(x, layer.format.activations, layer.inputs)
        zero_point = 0 if codes.zero_point is None else codes.zero_point.double()
        changed = ((codes.codes.double() - zero_point) * codes.scale.double()).view(x.shape)
    wide = copy.deepcopy(layer).double()
    return changed.double() @ wide.dequantize().T + (0 if wide.bias is None else wide.bias)


def error(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


def runs(layer: QuantLinear) -> list[dispatch.Implementation]:
    """All that take the layer, whatever the number of rows, but the reference."""
    return [row for row in dispatch.prepare(layer).able if row.name != "reference"]


def call(row: dispatch.Implementation, x: Tensor, layer: QuantLinear) -> Tensor:
    assert layer.runtime is not None
    return row.run(x, layer, layer.runtime.packed)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_weight_only_is_rounded_like_a_bfloat16_product(scheme: str, rows: int, columns: int) -> None:
    layer = layer_of(scheme, rows, columns)
    implementations = runs(layer)
    assert len(implementations) == 2
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, columns).bfloat16()
        want = exactly(x, layer)
        few, many = (call(row, x, layer) for row in implementations)
        assert few.dtype == many.dtype == torch.bfloat16
        # One rounding, or two: of a correction for zero points, of products that are scaled afterwards, of weights.
        assert error(few, want) < BFLOAT16 * (1.3 if scheme.startswith("W4Z") else 1.1)
        assert error(many, want) < BFLOAT16 * 1.5
        # The unpacked 4-bit weights are the reference's, bit for bit.
        if implementations[1].name == "cpu int4 unpacked":
            assert error(many, reference.linear(x, layer).double()) < BFLOAT16 / 2


@pytest.mark.parametrize("scheme", ["W4A16G64", "W4ZA16G64", "W8A16", "W8A8", "W8A8ZTS"])
def test_bias_shapes_and_strides(scheme: str) -> None:
    layer = layer_of(scheme, 40, 100, bias=True)
    for x in (
        torch.randn(100), torch.randn(0, 100), torch.randn(2, 3, 100), torch.randn(2, 0, 100),
        torch.randn(5, 200)[:, ::2], torch.randn(100, 7).T, torch.randn(1, 100).expand(4, 100),
    ):  # fmt: skip
        x = x.bfloat16()
        want = reference.linear(x, layer)
        for row in runs(layer):
            before = x.clone()
            y = call(row, x, layer)
            assert y.shape == want.shape == (*x.shape[:-1], 40)
            assert y.is_contiguous()
            assert torch.equal(x, before)
            torch.testing.assert_close(y, want, rtol=0.02, atol=0.15)
            if x.numel():
                assert error(y, want.double()) < 6e-3


def test_zero_points_do_not_shift_groups() -> None:
    """Rounding (8 - zero point) * scale to bfloat16 adds the same error to a whole group: it shows in the sum of x."""
    mean = torch.tensor([1.1, -1.1]).repeat_interleave(128).repeat(2)  # so that the groups' sums take each other off
    layer = layer_of("W4ZA16G128", 64, 512, mean=mean)
    x = (torch.randn(8, 512) + 20).bfloat16()
    want = exactly(x, layer)
    assert dispatch.prepare(layer).packed.rest is not None
    few, many = (error(call(row, x, layer), want) for row in runs(layer))
    assert few < 2 * BFLOAT16
    assert many < 1.1 * error(reference.linear(x, layer), want)  # which rounds every weight by itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("scheme", INTEGER)
def test_integers_are_added_up_exactly(scheme: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    layer = layer_of(scheme, rows, columns, dtype)
    (row,) = runs(layer)
    assert row.name == "cpu int8"
    for tokens in (1, 5, 40):
        x = (torch.randn(tokens, columns) + 0.5).to(dtype)
        found = call(row, x, layer)
        assert found.dtype == dtype
        rounding = {torch.bfloat16: BFLOAT16, torch.float16: BFLOAT16 / 8, torch.float32: 2e-7}[dtype]
        assert error(found, exactly(x, layer)) < rounding


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8Z"])
def test_lopsided_weights_are_added_up_exactly_too(scheme: str) -> None:
    """All codes at one end: the sum with unsigned activations is far above 2**24, the result is not."""
    layer = layer_of(scheme, 16, 4096, torch.float32)
    layer.unpack()
    layer.weight.fill_(127)
    assert dispatch.prepare(layer).packed.lopsided
    sign = torch.ones(3, 4096).index_fill_(1, torch.arange(0, 4096, 2), -1)
    x = sign * torch.rand(3, 4096).add(1)
    (row,) = runs(layer)
    assert error(call(row, x, layer), exactly(x, layer)) < 2e-7
    ordinary = layer_of(scheme, 16, 4096, torch.float32, mean=0.0)
    assert not dispatch.prepare(ordinary).packed.lopsided


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("scheme", [*INTEGER, "W4A5", "W4A4Z", "W4A3T"])
def test_codes_are_those_of_the_reference(scheme: str, clipped: bool, dtype: torch.dtype) -> None:
    activations = Scheme.parse(scheme).activations
    assert activations is not None
    clipped = clipped and activations.dynamic
    fmt = layer_format(scheme, input_clip=clipped)
    inputs = layer_inputs(fmt, 300, dtype=dtype)
    x = torch.randn(2, 7, 300).mul(torch.logspace(-3, 1, 7)[:, None]).add(0.1).to(dtype)
    x[0, 0] = 0
    codes = input_codes.quantize(x, activations, inputs)
    zero_point = 0 if codes.zero_point is None else codes.zero_point.to(dtype)
    values = (codes.codes.to(dtype) - zero_point) * codes.scale.to(dtype)
    want = reference.fake_quantize(x, activations, inputs.static_scale, inputs.static_zero_point, inputs.clip)
    assert torch.equal(values.view(x.shape), want)


@pytest.mark.parametrize("scheme", ["W4A16G64", "W4ZA16G32", "W8A16", "W8A8", "W8A8Z", "W4A8", "W8A8TS", "W8A8ZTS"])
def test_what_is_not_finite_stays_so(scheme: str) -> None:
    layer = layer_of(scheme, 40, 100)
    x = torch.randn(6, 100).bfloat16()
    x[1, 3], x[2, 7], x[3, 99], x[4, 50] = math.nan, math.inf, -math.inf, 3e38
    want = reference.linear(x, layer)
    for row in runs(layer):
        y = call(row, x, layer)
        for token in (0, 1, 5):
            assert torch.equal(y[token].isfinite(), want[token].isfinite())
        if layer.format.activations is None:  # the reference's weights are exact here: signs of infinities, too
            assert torch.equal(y[2:4].nan_to_num(7), want[2:4].nan_to_num(7)) or "int8 weights" in row.name
        else:
            assert torch.equal(y.isnan(), want.isnan())
        assert not y[2:4].isfinite().any() or not layer.format.activations.dynamic  # type: ignore[union-attr]


@pytest.mark.parametrize("columns", [100, 128, 77])
@pytest.mark.parametrize("activations", ["A16", "A8"])
@pytest.mark.parametrize(
    "weights", ["W2Z", "W2S", "W3Z", "W3S", "W4Z", "W4S", "W5Z", "W5S", "W6Z", "W7Z", "W7S", "W8S"]
)
def test_every_layout_gives_the_stored_bytes_back(weights: str, activations: str, columns: int) -> None:
    narrow = weights[1] in "234"
    layer = layer_of(f"{weights}{activations}G{'32' if narrow and activations == 'A16' else 'C'}", 75, columns)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    runtime = dispatch.prepare(layer)
    assert runtime.layout is not None
    assert layer._buffers[layer.weight_name] is None
    after = layer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert layer._buffers[layer.weight_name] is None  # given back for the moment only


@pytest.mark.parametrize("scheme", ["W3ZA16G32", "W5ZA16GC", "W4A8"])
def test_bits_that_no_code_explains_keep_the_layer_as_it_is(scheme: str) -> None:
    layer = layer_of(scheme, 8, 33)
    layer.weight_packed[3, -1] |= -(2**31)
    x = torch.randn(2, 33).bfloat16()
    assert dispatch.choose(x, layer).name == "reference"
    assert layer.runtime is not None
    assert layer.runtime.layout is None
    assert layer.weight_packed is not None


def test_large_groups_and_odd_ones() -> None:
    """A group of 96 is three of 32; 512 is two of 256; per channel takes the largest that divides the columns."""
    for scheme, columns, group in (("W4A16G96", 192, 32), ("W4A16G512", 1024, 256), ("W4A16GC", 192, 64)):
        assert dispatch.prepare(layer_of(scheme, 64, columns)).packed.group == group


def test_torch_packs_in_the_order_that_is_unpacked() -> None:
    codes = torch.randint(0, 16, (192, 40), dtype=torch.uint8)
    block = int4._block()
    assert block is not None
    assert torch.equal(int4._convert(codes), int4._in_blocks(codes, block))
    assert torch.equal(int4._codes(int4._convert(codes), block), codes)


@pytest.mark.parametrize(
    ("scheme", "dtype", "reasons"),
    [
        ("W4A16G24", torch.bfloat16, {"cpu int4": "groups of 24 are no multiple of 32"}),
        ("WNF4A16G64", torch.bfloat16, {"cpu int4": "nf4 codes are not evenly spaced"}),
        ("W4A16G64", torch.float16, {"cpu int4": "for bfloat16 models, not float16"}),
        ("W4A16G64", torch.float32, {"cpu int4": "for bfloat16 models, not float32"}),
        ("W8A16G64", torch.bfloat16, {"cpu int8 weights": "for one scale per row, not groups of 64"}),
        ("W8ZA16", torch.bfloat16, {"cpu int8 weights": "8-bit codes with zero points do not fit into int8"}),
        ("W8A16", torch.float32, {"cpu int8 weights": "for bfloat16 models, not float32"}),
        ("W8ZA8", torch.bfloat16, {"cpu int8": "8-bit codes with zero points do not fit into int8"}),
        ("W4A8G64", torch.bfloat16, {"cpu int8": "for one scale per row, not groups of 64"}),
        ("W8A8B32", torch.bfloat16, {"cpu int8": "for one scale per token, not per 32 channels"}),
        ("W8A8", torch.float64, {"cpu int8": "for models of 16 or 32 bits, not float64"}),
    ],
)
def test_what_is_left_to_the_reference(scheme: str, dtype: torch.dtype, reasons: dict[str, str]) -> None:
    layer = QuantLinear(128, 32, False, layer_format(scheme), dtype, device="meta")
    chosen, against = dispatch.explain(layer, torch.device("cpu"), 1)
    assert chosen.name == "reference"
    assert against.items() >= reasons.items()


def test_sums_that_could_overflow_are_left_to_the_reference() -> None:
    widest = 65793  # 65793 * 255 * 128 = 2**31 - 1 - 7
    for columns, name in ((widest, "cpu int8"), (widest + 1, "reference")):
        layer = QuantLinear(columns, 2, False, layer_format("W8A8"), torch.float32, device="meta")
        assert dispatch.explain(layer, torch.device("cpu"), 1)[0].name == name
    layer = layer_of("W8A8", 2, widest, torch.float32)
    layer.unpack()
    layer.weight.fill_(-128)
    x = torch.full((1, widest), -1.0)
    assert dispatch.choose(x, layer).name == "cpu int8"
    assert error(layer(x), exactly(x, layer)) < 2e-7
    assert error(layer(-x), exactly(-x, layer)) < 2e-7


@pytest.mark.parametrize("scheme", ["W4ZA16G64", "W8A16", "W8A8Z", "W8A8TS"])
def test_compilers_see_one_operator(scheme: str) -> None:
    layer = layer_of(scheme, 40, 100, bias=True)
    dispatch.prepare(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for tokens in (3, 40):
        x = torch.randn(tokens, 100).bfloat16()
        assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,))
    assert any("quantkit" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), layer(x))


def test_operators_keep_what_their_fakes_promise() -> None:
    """But for the integer one: opcheck cannot make a copy of a weight in oneDNN's order."""
    x = torch.randn(3, 100).bfloat16()
    bias = torch.randn(40).bfloat16()
    packed = dispatch.prepare(layer_of("W4ZA16G64", 40, 100)).packed
    checks = ("test_schema", "test_faketensor")
    few = (x, packed.codes, packed.scale_zero, packed.rest, bias, packed.group, 40)
    torch.library.opcheck(int4._few_rows_op, few, test_utils=checks)
    many = (x, packed.codes, packed.scale_zero, packed.zero_point, bias, packed.group, 40)
    torch.library.opcheck(int4._many_rows_op, many, test_utils=checks)
    layer = layer_of("W8A16", 40, 100)
    weights = (x, dispatch.prepare(layer).packed, layer.weight_scale, bias)
    torch.library.opcheck(int8_weights._few_rows_op, weights, test_utils=checks)
    torch.library.opcheck(int8_weights._many_rows_op, weights, test_utils=checks)
