"""The integer kernels compiled for GPUs that are not there: nothing spills, all fits, integers are multiplied."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_layer

from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import ahead, compat, configs, integer, integer_kernels, integer_report
from quantkit.kernels.triton.integer_report import Variant

pytestmark = [
    pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton"),
    pytest.mark.usefixtures("nothing_kept"),
]

BUDGET = {8: 1.3, 4: 2.7, 2: 2.5}
"""Bits -> instructions per weight of few rows, groups of 32 apart: a tenth above what was counted."""


def shipped(target: str, rows: int) -> list[Variant]:
    return [variant for variant in integer_report.variants(target) if variant.rows == rows]


def check(variant: Variant) -> None:
    built = integer_report.build(variant)
    assert built.spilled == 0, variant.name
    assert built.shared <= configs.SHARED_LIMIT[variant.target], variant.name
    wide = r"global_load_dwordx4" if variant.target == "gfx942" else r"LDGSTS\.E\S*\.128"
    for instruction in (integer_report.PRODUCTS[variant.target], wide):
        assert built.count(instruction) > 0, (variant.name, instruction)
    assert not built.count(r"[HQ]G?MMA|v_mfma_f32"), variant.name
    if variant.target != "gfx942" and variant.rows == 8 and variant.group_size != 32:
        assert integer_report.cost(variant, built) < BUDGET[variant.bits], variant.name


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize(("bits", "rows"), [(8, 256), (4, 8)])
def test_symmetric_weights_compile(target, bits, rows):
    check(next(variant for variant in shipped(target, rows) if (variant.bits, variant.group_size) == (bits, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_format_compiles(target):
    """A tile of few rows and one of many in turn, the other way round on the next target; the report builds all."""
    turn = ahead.TARGETS.index(target)
    for place, (few, many) in enumerate(zip(shipped(target, 8), shipped(target, 256), strict=True)):
        check(few if (place + turn) % 2 else many)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_adding_up_codes_compiles(target):
    built = integer_report.build_sums(target)
    assert built.spilled == 0
    assert built.shared <= configs.SHARED_LIMIT[target]
    assert built.count(r"I\S*MMA|v_mfma_i32") > 0


def test_bytes_are_not_shuffled_on_their_way_into_the_product():
    """What Triton does to 8-bit operands on sm_80, unless they pass through PTX: two instructions and more for each."""
    variants = [v for v in shipped("sm_80", 64) if (v.bits, v.group_size, v.zero_point) == (8, -1, False)]
    assert variants
    for variant in variants:
        assert integer_report.build(variant).loop["PRMT"] < 8, variant.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "tokens", "grids"),
    [
        ("W4ZA8ZG128", 4096, 512, 1, [("matmul_kernel", (32, 2))]),  # shared between programs
        ("W8ZA8", 1, 1, 40, [("sums_kernel", (3, 1)), ("matmul_kernel", (1, 1))]),  # sizes of 1 become constants
        ("W8A8T", 4096, 1000, 2000, [("matmul_kernel", (256, 1))]),
    ],
)
def test_what_is_launched_compiles(compiled_only, monkeypatch, scheme, rows, columns, tokens, grids):
    """The launch as it is made on a GPU: its arguments fit the kernels, in whatever way Triton specialises them."""
    launches = compiled_only(integer_kernels, "matmul_kernel", "sums_kernel")
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("sm_90", 132))
    layer = random_layer(scheme, rows, columns, bias=True, dtype=torch.bfloat16)
    packed = integer.pack(layer)
    assert packed is not None
    zero = None if layer.format.activations.symmetric else torch.zeros(tokens, 1)
    codes = InputCodes(torch.zeros(tokens, columns, dtype=torch.int8), torch.ones(1, 1).expand(tokens, 1), zero)
    assert integer.multiply(codes, packed, layer.bias, torch.bfloat16).shape == (tokens, rows)
    assert [launch[:2] for launch in launches] == grids
