"""The integer kernels in Triton's interpreter, against float64 products of the same codes with the stored weight."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from handmade import layer_format
from random_layers import random_layer, relative_error
from torch import Tensor

from quantkit.kernels import dispatch
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import compat, configs, integer, integer_configs, integer_layout
from quantkit.kernels.triton.configs import Config
from quantkit.layers.quant_linear import QuantLinear

pytestmark = pytest.mark.usefixtures("poisoned")

SCHEMES = ["W8A8", "W8A8G32", "W8ZA8", "W8ZA8Z", "W8ZA8ZG64", "W8A8ZG128", "W8A8TS", "W8ZA8ZTS", "W8A8ZT",
           "W4A8", "W4A8Z", "W4A8G128", "W4A8ZG64", "W4ZA8", "W4ZA8ZG32", "W4ZA8G96", "W4ZA8Z", "W4A4", "W4ZA4ZG64",
           "W6SA6", "W5ZA6ZG32", "W2SA8G128", "W2SA8Z", "W2ZA8ZG32",
           "W3A8", "W3A3", "W3SA8Z", "W3SA3G64", "W3SA8ZG32", "W3ZA8ZG96"]  # fmt: skip
BOUND = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 2**-7}
"""Relative. Of half: its rounding alone is 2e-4. The interpreter cuts bfloat16 off where a GPU rounds."""
FEW = Config(block_m=16, block_n=64, split=1, warps=4, stages=1, scale_after=True)


@pytest.fixture
def interpreter(interpreted_integer_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Launches on CPU tensors run in the interpreter."""
    monkeypatch.setattr(integer, "_kernels", lambda: interpreted_integer_kernels)
    return interpreted_integer_kernels


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(integer_configs, "heuristic", lambda problem, device: config)


def layer_of(scheme: str, rows: int, columns: int, bias: bool, dtype: torch.dtype) -> QuantLinear:
    """Random, and where its inputs have a static grid, one that cuts some of them off."""
    layer = random_layer(scheme, rows, columns, bias, dtype)
    buffers = dict(layer.named_buffers())
    if "input_scale" in buffers:
        buffers["input_scale"].fill_(0.02)
    if "input_zero_point" in buffers:
        buffers["input_zero_point"].fill_(-37)
    return layer


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows that differ by a lot, none of them around 0: a lost scale, and a lost zero point, show."""
    return (torch.randn(rows, columns) + 0.7).mul(torch.logspace(-1, 1, rows)[:, None]).to(dtype)


def exact(codes: InputCodes, layer: QuantLinear) -> Tensor:
    """float64, of the same codes: the integers themselves, and scales as they are stored."""
    weight = exact_weight(layer)
    x = codes.codes.double()
    if codes.zero_point is not None:
        x = x - codes.zero_point.double()
    y = x * codes.scale.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


def exact_weight(layer: QuantLinear) -> Tensor:
    """The weight in float64, from the stored tensors by the reference."""
    double = QuantLinear(layer.in_features, layer.out_features, False, layer.format, torch.float64)
    double.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "bias"})
    return double.dequantize()


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(interpreter, monkeypatch, scheme, dtype):
    """Rows and columns that fill no tile, a last group and a last block that are short, groups that straddle blocks."""
    use(monkeypatch, FEW)
    layer = layer_of(scheme, 70, 264, bias=True, dtype=dtype)
    x = inputs(3, 264, dtype)
    y = integer.run(x, layer, integer.pack(layer))
    assert y.dtype == dtype
    assert relative_error(y, exact(layer.input_codes(x), layer)) < BOUND[dtype]


@pytest.mark.parametrize("scheme", ["W8A8", "W8ZA8ZG32", "W4ZA8Z", "W4A4ZG64"])
def test_computes_what_the_reference_does(interpreter, scheme):
    """Not only the product: the input's scale, its rounding, all in the dtype of the model."""
    layer = random_layer(scheme, 40, 128, True, torch.float32, input_scale=True)
    x = inputs(2, 192, torch.float32).view(2, 1, 192)[..., 5:133]
    y = integer.run(x, layer, integer.pack(layer))
    torch.testing.assert_close(y, dispatch.IMPLEMENTATIONS[-1].run(x, layer, None), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33, 65])
@pytest.mark.parametrize("scheme", ["W8A8", "W4ZA8ZG32"])
def test_every_number_of_rows(interpreter, scheme, rows):
    """With the tile that the heuristic takes for it; scales of one row of x that reach another show."""
    layer = layer_of(scheme, 33, 160, bias=False, dtype=torch.float32)
    x = inputs(rows, 160, torch.float32)
    y = integer.run(x, layer, integer.pack(layer))
    for one, want in zip(y, exact(layer.input_codes(x), layer), strict=True):
        assert relative_error(one, want) < BOUND[torch.float32]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (64, 32), (129, 65), (128, 257)])
@pytest.mark.parametrize("scheme", ["W8A8ZG64", "W4A8", "W4ZA8ZG32", "W8ZA8Z"])
def test_sizes_that_fill_no_tile(interpreter, scheme, rows, columns):
    layer = layer_of(scheme, rows, columns, bias=True, dtype=torch.float32)
    x = inputs(2, columns, torch.float32)
    y = integer.run(x, layer, integer.pack(layer))
    assert relative_error(y, exact(layer.input_codes(x), layer)) < BOUND[torch.float32]


@pytest.mark.parametrize("scheme", ["W8ZA8Z", "W4ZA8ZG128"])
@pytest.mark.parametrize("split", [2, 3, 4])
def test_programs_that_share_a_tile(interpreter, monkeypatch, scheme, split):
    """Four blocks among 2, 3 (one has none) and 4 programs; the counters are ready for the next call; bias once."""
    use(monkeypatch, FEW._replace(split=split))
    layer = layer_of(scheme, 70, 500, bias=True, dtype=torch.float32)
    packed = integer.pack(layer)
    assert packed.weight.tiles.shape[0] == 4
    x = inputs(5, 500, torch.float32)
    first = integer.run(x, layer, packed)
    assert relative_error(first, exact(layer.input_codes(x), layer)) < BOUND[torch.float32]
    assert not packed.arrived.any()
    assert torch.equal(integer.run(x, layer, packed), first)


def test_more_tiles_than_counters_are_not_shared(interpreter, monkeypatch):
    use(monkeypatch, FEW._replace(split=2, block_m=1))
    layer = layer_of("W4A8", 8, 256, bias=False, dtype=torch.float32)
    x = inputs(9, 256, torch.float32)
    y = integer.run(x, layer, integer.pack(layer))
    assert relative_error(y, exact(layer.input_codes(x), layer)) < BOUND[torch.float32]


def test_every_tile_is_computed_once_in_any_order(interpreter, monkeypatch):
    """11 tiles of tokens in runs of ``TALL``, the last one short, by 3 of rows."""
    use(monkeypatch, FEW._replace(block_m=4))
    layer = layer_of("W8A8", 190, 32, bias=False, dtype=torch.float32)
    x = inputs(41, 32, torch.float32)
    assert integer_configs.TALL == 8
    y = integer.run(x, layer, integer.pack(layer))
    assert relative_error(y, exact(layer.input_codes(x), layer)) < BOUND[torch.float32]


@pytest.mark.parametrize("scheme", ["W8ZA8Z", "W4A4", "W4ZA8ZG32"])
def test_shapes_and_strides_of_the_input(interpreter, scheme):
    layer = layer_of(scheme, 40, 96, bias=True, dtype=torch.float16)
    packed = integer.pack(layer)
    wide = inputs(6, 200, torch.float16).view(2, 3, 200)
    for x in (wide[..., :96], wide[..., 1:97], wide[..., 4::2][..., :96], wide[0, 0, :96], wide[:0, :, :96]):
        y = integer.run(x, layer, packed)
        assert y.shape == (*x.shape[:-1], 40)
        if y.numel():
            want = exact(layer.input_codes(x), layer).view(y.shape)
            assert relative_error(y, want) < BOUND[torch.float16]


def test_codes_may_lie_apart(interpreter):
    """What the launcher is given need not be contiguous: rows and columns apart, one scale for all rows."""
    layer = layer_of("W8ZA8Z", 40, 96, bias=False, dtype=torch.float32)
    packed = integer.pack(layer)
    wide = torch.randint(-128, 128, (4, 300), dtype=torch.int8)
    scale, zero = torch.rand(1, 1).expand(4, 1), torch.randint(-128, 128, (4, 2)).float()[:, 1:]
    for codes in (wide[:, :96], wide[:, 3:99], wide[:, ::3][:, :96], wide[::2, :96], wide[0, :96].expand(4, 96)):
        given = InputCodes(codes, scale[: len(codes)], zero[: len(codes)])
        y = integer.multiply(given, packed, None, torch.float32)
        assert relative_error(y, exact(given, layer)) < BOUND[torch.float32]
    empty = InputCodes(wide[:0, :96], scale[:0], zero[:0])
    assert integer.multiply(empty, packed, None, torch.float16).shape == (0, 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["W8A8", "W8ZA8ZG32", "W4A8Z", "W4A8TS"])
def test_what_is_not_finite_stays_in_its_row(interpreter, scheme, value):
    layer = layer_of(scheme, 40, 100, bias=True, dtype=torch.float16)
    x = inputs(3, 100, torch.float16)
    x[1, 99] = value
    y = integer.run(x, layer, integer.pack(layer))
    cut_off = scheme.endswith("TS") and value == float("inf")
    assert y[1].isnan().all() != cut_off
    assert y[[0, 2]].isfinite().all()
    want = dispatch.IMPLEMENTATIONS[-1].run(x, layer, None)
    assert torch.equal(want.isfinite(), y.isfinite())


@pytest.mark.parametrize("scheme", ["W8ZA8Z", "W8A8Z", "W8A8", "W4ZA8Z", "W4A8", "W3A8", "W3SA8Z"])
def test_the_bound_of_int32(scheme):
    """The largest sum that the most columns can have fits, and that of one more does not."""
    layer = layer_format(scheme)
    assert layer.activations is not None
    most = integer_layout.most_columns(layer)
    assert most is not None
    w = 128 if layer.weights.symmetric else 2**layer.weights.bits - 1  # symmetric, 4 bits: 8 * 16
    x = 128 if layer.activations.symmetric else 255
    assert most * x * w < 2**31 <= (most + 1) * x * w


@pytest.mark.parametrize(("symmetric", "most"), [(True, 131071), (False, 33025)])
def test_sums_at_the_bound_of_int32_are_exact(interpreter, monkeypatch, symmetric, most):
    """Every product the largest there is: -128 * -128, or (127 + 128) * (255 - 0) with zero points at the ends."""
    use(monkeypatch, FEW._replace(block_m=1))
    monkeypatch.setattr(integer_layout, "plane_of", lambda width, group_size: 4096)  # few steps of the interpreter
    layer = QuantLinear(most, 1, False, layer_format("W8A8" if symmetric else "W8ZA8Z"), torch.float32)
    layer.weight_scale.fill_(1)
    if symmetric:
        layer.weight.fill_(-128)
        codes = InputCodes(torch.full((1, most), -128, dtype=torch.int8), torch.ones(1, 1), None)
    else:
        layer.weight_packed.fill_(-1)  # codes of 255
        layer.weight_packed[:, -1] &= (1 << 8 * (most % 4)) - 1 if most % 4 else -1
        layer.weight_zero_point.zero_()
        layer.weight_shape.copy_(torch.tensor([1, most]))
        codes = InputCodes(torch.full((1, most), 127, dtype=torch.int8), torch.ones(1, 1), torch.full((1, 1), -128.0))
    assert integer_layout.most_columns(layer.format) == most
    y = integer.multiply(codes, integer.pack(layer), None, torch.float32)
    assert float(y) == float(torch.tensor(most * (128 * 128 if symmetric else 255 * 255)).float()) > 2**31 - 2**17


def test_operator_has_a_shape_without_data_and_passes_opcheck(interpreter):
    layer = layer_of("W4ZA8Z", 40, 96, bias=True, dtype=torch.float32)
    packed, codes = integer.pack(layer), layer.input_codes(torch.randn(2, 96))
    weight = packed.weight
    arguments = (*codes, weight.tiles, weight.steps, weight.sums, layer.bias, packed.arrived, weight.width,
                 weight.zero_point, weight.group_size, 40, torch.float16)  # fmt: skip
    torch.library.opcheck(torch.ops.quantkit.integer_linear.default, arguments)


@pytest.mark.parametrize(
    ("scheme", "columns", "dtype", "device", "reason"),
    [
        ("W4A8", 96, torch.float16, "cpu", "for GPUs, not cpu"),
        ("W4A16G32", 96, torch.float16, "cuda", "activations are not rounded"),
        ("W4A4B32", 96, torch.float16, "cuda", "for one scale per token, not per 32 channels"),
        ("WNF4A8G32", 96, torch.float16, "cuda", "nf4 codes are not evenly spaced"),
        ("W3A8", 96, torch.float16, "cuda", None),
        ("W4A8G16", 96, torch.float16, "cuda", "groups of 16 are no multiple of 32"),
        ("W4A8", 96, torch.float64, "cuda", "for models of 16 or 32 bits, not float64"),
        ("W8A8", 131072, torch.float16, "cuda", "sums of 131072 products may overflow int32"),
        ("W8A8", 131071, torch.float16, "cuda", None),
        ("W8A8G128", 131072, torch.float16, "cuda", None),
        ("W4A8", 96, torch.float16, "cuda", "for sm_80 and later, gfx90a, gfx942 and gfx950, not sm_75"),
        ("W4ZA4ZG64", 96, torch.bfloat16, "cuda", None),
    ],
)
def test_says_what_it_does_not_run(monkeypatch, scheme, columns, dtype, device, reason):
    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kind = "sm_75" if reason and "sm_75" in reason else "sm_90"
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device(kind, 132))
    layer = QuantLinear(columns, 8, False, layer_format(scheme), dtype, device="meta")
    assert integer.refuses(layer, torch.device(device)) == reason


def test_comes_before_the_weight_only_kernels():
    """On a GPU a rounded input stays rounded, and what is refused there is still multiplied from packed weights."""
    names = [row.name for row in dispatch.IMPLEMENTATIONS]
    assert names.index("triton integer") < names.index("triton weight-only")


def test_heuristics_are_possible_and_keep_processors_busy():
    h200 = configs.Device("sm_90", 132, "H200")
    for kind, rows in itertools.product(integer_configs.TABLE, integer_configs._BUCKETS):
        for width, plane, group_size in ((8, 128, -1), (8, 32, 32), (4, 64, 128), (4, 32, 32), (2, 64, 64)):
            problem = integer_configs.Problem(width, plane, group_size, False, 4096, 32, rows)
            config = integer_configs.heuristic(problem, configs.Device(kind, 100))
            assert integer_layout.ROWS % config.block_n == 0
            bytes_ = integer_configs._stage_bytes(configs.Tile(*config[:4]), problem)
            assert config.stages * bytes_ <= configs.SHARED_LIMIT[kind]
            assert group_size == -1 or config.block_m <= 128
    wide = integer_configs.Problem(4, 64, -1, False, 4096, 32, 8)
    assert integer_configs.heuristic(wide, h200).split == 8
    assert integer_configs.heuristic(wide._replace(out_features=28672), h200).split == 2
    assert integer_configs.heuristic(wide._replace(rows=1024, out_features=28672), h200).split == 1
    assert [integer_configs.bucket(rows) for rows in (1, 9, 64, 65, 300, 5000)] == [8, 16, 64, 128, 1024, 1024]


def test_measured_tiles_have_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QUANTKIT_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "_fastest", {})
    monkeypatch.setattr(configs, "_milliseconds", lambda run, config: abs(config.split - 4))
    problem = integer_configs.Problem(8, 128, -1, False, 4096, 32, 16)
    device = configs.Device("sm_90", 132, "H200")
    assert integer_configs.choose(problem, device, lambda config: None).split == 4
    (path,) = (tmp_path / "quantkit").iterdir()
    assert path.name == f"integer-1-sm_90-132-H200-triton-{compat.version()}.json"
