"""The kernels in Triton's interpreter, against float64 products with the stored weight.

bfloat16 is not here: the interpreter computes it wrongly and says nothing. What depends on the dtype is the unpacking,
which test_compile.py checks bit for bit in the compiled form; all else runs here in float32 and half.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_layers import exact_product, random_layer, relative_error

from quantkit.kernels.lacking import Lacking
from quantkit.kernels.triton import compat, configs, weight_only
from quantkit.kernels.triton.configs import Config

pytestmark = pytest.mark.usefixtures("poisoned")

SCHEMES = ["W8A16G32", "W8ZA16GC", "W4A16G128", "W4ZA16G64", "W4ZA16G96", "W3ZA16G128", "W3SA16GC", "W2ZA16G64",
           "W2SA16G32", "WNF4A16G64", "W8A8"]  # fmt: skip


BOUND = {torch.float16: 4e-4, torch.float32: 1e-6}
"""Relative, for scales after the product: the output's rounding alone is 2e-4 in half."""


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(configs, "heuristic", lambda problem, device: config)


FEW = Config(block_m=16, block_n=64, split=1, warps=4, stages=1, scale_after=True)


@pytest.mark.parametrize("after", [True, False], ids=["scale after", "scale before"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(interpreter, monkeypatch, scheme, after):
    """Rows and columns that fill no tile, a last group and a last block that are short, groups that straddle blocks."""
    use(monkeypatch, FEW._replace(scale_after=after))
    dtype = torch.float16 if after else torch.float32
    layer = random_layer(scheme, 70, 264, bias=True, dtype=dtype)
    x = torch.randn(3, 264, dtype=dtype)
    y = weight_only.run(x, layer, weight_only.pack(layer))
    assert y.dtype == dtype
    assert relative_error(y, exact_product(x, layer)) < BOUND[dtype]


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 33, 65])
def test_every_number_of_rows(interpreter, rows):
    """With the tile that the heuristic takes for it; two tiles of rows from 65 on with 64 to a tile."""
    layer = random_layer("W4ZA16G32", 33, 160, bias=False, dtype=torch.float16)
    x = torch.randn(rows, 160, dtype=torch.float16)
    bound = BOUND[torch.float16] if rows <= 32 else 6e-4  # scaled weights are rounded to half as well
    assert relative_error(weight_only.run(x, layer, weight_only.pack(layer)), exact_product(x, layer)) < bound


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (129, 65), (128, 257)])
@pytest.mark.parametrize("scheme", ["W8A16G32", "W4ZA16GC", "W3ZA16G64", "W2SA16GC", "WNF4A16G64"])
def test_sizes_that_fill_no_tile(interpreter, scheme, rows, columns):
    """Columns that fill no word of packed codes, either."""
    layer = random_layer(scheme, rows, columns, bias=True, dtype=torch.float32)
    x = torch.randn(2, columns)
    y = weight_only.run(x, layer, weight_only.pack(layer))
    assert relative_error(y, exact_product(x, layer)) < BOUND[torch.float32]


@pytest.mark.parametrize("split", [2, 3, 4])
def test_programs_that_share_a_tile(interpreter, monkeypatch, split):
    """Four blocks among 2, 3 (one has none) and 4 programs; the counters are ready for the next call; bias once."""
    use(monkeypatch, FEW._replace(split=split))
    layer = random_layer("W4ZA16G128", 70, 500, bias=True, dtype=torch.float32)
    packed = weight_only.pack(layer)
    x = torch.randn(5, 500)
    first = weight_only.run(x, layer, packed)
    assert relative_error(first, exact_product(x, layer)) < BOUND[torch.float32]
    assert not packed.arrived.any()
    assert torch.equal(weight_only.run(x, layer, packed), first)


def test_more_tiles_than_counters_are_not_shared(interpreter, monkeypatch):
    use(monkeypatch, FEW._replace(split=2, block_m=1))
    layer = random_layer("W4A16G32", 8, 256, bias=False, dtype=torch.float32)
    x = torch.randn(9, 256)
    assert (
        relative_error(weight_only.run(x, layer, weight_only.pack(layer)), exact_product(x, layer))
        < BOUND[torch.float32]
    )


@pytest.mark.parametrize("scheme", ["W8ZA16G32", "W4ZA16G64", "W3ZA16G128", "W2SA16GC", "WNF4A16G64"])
def test_many_rows_multiply_the_weight_of_the_reference(interpreter, monkeypatch, scheme):
    monkeypatch.setattr(configs, "crossover", lambda device: 2)
    layer = random_layer(scheme, 70, 264, bias=True, dtype=torch.float16)
    packed = weight_only.pack(layer)
    weight = packed.weight
    given = weight_only._Weight(
        weight.words, weight.high, weight.steps, packed.levels, weight.bits, weight.zero_point, weight.group_size, 70
    )
    assert torch.equal(weight_only._dequantize(given, 264, torch.float16), layer.dequantize())
    x = torch.randn(3, 264, dtype=torch.float16)
    assert relative_error(weight_only.run(x, layer, packed), exact_product(x, layer)) < 1e-3


def test_shapes_and_strides_of_the_input(interpreter):
    layer = random_layer("W4A16G32", 40, 96, bias=True, dtype=torch.float16)
    packed = weight_only.pack(layer)
    wide = torch.randn(2, 3, 200, dtype=torch.float16)
    for x in (wide[..., :96], wide[..., 1:97], wide[..., 4::2][..., :96], wide[0, 0, :96], wide[:0, :, :96]):
        y = weight_only.run(x, layer, packed)
        assert y.shape == (*x.shape[:-1], 40)
        if y.numel():
            assert relative_error(y, exact_product(x, layer)) < BOUND[torch.float16]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["W4ZA16G32", "W2SA16GC", "WNF4A16G64"])
def test_what_is_not_finite_stays_in_its_row(interpreter, scheme, value):
    layer = random_layer(scheme, 40, 100, bias=False, dtype=torch.float16)
    x = torch.randn(3, 100, dtype=torch.float16)
    x[1, 99] = value
    y = weight_only.run(x, layer, weight_only.pack(layer))
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_input_scale_and_rounded_input_come_first(interpreter):
    layer = random_layer("W4ZA8G64", 40, 128, False, torch.float32, input_scale=True)
    x = torch.randn(3, 128)
    y = weight_only.run(x, layer, weight_only.pack(layer))
    assert relative_error(y, exact_product(x, layer)) < BOUND[torch.float32]
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_operator_has_a_shape_without_data_and_passes_opcheck(interpreter):
    layer = random_layer("W4A16G32", 40, 96, bias=True, dtype=torch.float32)
    packed, weight = weight_only.pack(layer), weight_only.pack(layer).weight
    arguments = (torch.randn(2, 96), weight.words, weight.high, weight.steps, packed.levels, layer.bias,
                 packed.arrived, weight.bits, weight.zero_point, weight.group_size, 40)  # fmt: skip
    torch.library.opcheck(torch.ops.quantkit.weight_only_linear.default, arguments)


@pytest.mark.parametrize(
    ("scheme", "dtype", "device", "reason"),
    [
        ("W4A16G32", torch.float16, "cpu", "for GPUs, not cpu"),
        ("W4A16G32", torch.float32, "cuda", "for half and bfloat16 models, not float32"),
        ("W6A16G32", torch.float16, "cuda", "for 2, 3, 4 and 8 bits, not 6"),
        ("W4A16G16", torch.float16, "cuda", "groups of 16 are no multiple of 32"),
        ("W4A16G32", torch.float16, "cuda", "for sm_80 and later, gfx90a, gfx942 and gfx950, not sm_75"),
        ("W4A16G32", torch.bfloat16, "cuda", None),
    ],
)
def test_says_what_it_does_not_run(monkeypatch, scheme, dtype, device, reason):
    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kind = "sm_75" if reason and "sm_75" in reason else "sm_90"
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device(kind, 132))
    layer = random_layer(scheme, 40, 96, bias=False, dtype=dtype)
    refused = weight_only.refuses(layer, torch.device(device))
    assert refused == reason
    assert isinstance(refused, Lacking) == (kind == "sm_75")  # the machine's doing, which is said


def test_does_without_triton(monkeypatch):
    monkeypatch.setattr(compat, "AVAILABLE", False)
    layer = random_layer("W4A16G32", 40, 96, bias=False, dtype=torch.float16)
    refused = weight_only.refuses(layer, torch.device("cuda"))
    assert refused == "triton is not installed"
    assert isinstance(refused, Lacking)


def test_does_not_pack_what_it_could_not_give_back():
    layer = random_layer("W4A16G32", 40, 33, bias=False, dtype=torch.float16)
    packed = weight_only.pack(layer)
    assert packed is not None
    assert torch.equal(weight_only.restore(packed, layer), layer.weight_packed)
    layer.weight_packed[7, -1] |= 1 << 30  # behind the last code of a row
    assert weight_only.pack(layer) is None


def test_every_module_imports_where_triton_is_missing():
    folder = Path(weight_only.__file__).parent
    code = "import importlib, sys; sys.modules['triton'] = None\n"
    code += "".join(f"importlib.import_module('quantkit.kernels.triton.{path.stem}')\n" for path in folder.glob("*.py"))
    code += "from quantkit.kernels.triton import compat; assert not compat.AVAILABLE"
    subprocess.run([sys.executable, "-c", code], check=True)
