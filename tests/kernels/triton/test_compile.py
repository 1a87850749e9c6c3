"""The kernels compiled for GPUs that are not there: nothing spills, all fits, the instructions meant are there."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_layer

from quantkit.kernels.triton import ahead, compat, configs, weight_only, weight_only_kernels, weight_only_report
from quantkit.kernels.triton.weight_only_report import Variant

pytestmark = [
    pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton"),
    pytest.mark.usefixtures("nothing_kept"),
]

ROWS = {"fp16": 8, "bf16": 64}
"""A tile of each kind: few rows, columns shared between programs, scales after the product; and the other."""

BUDGET = {8: 4.5, 4: 3.3, 3: 3.6, 2: 2.9}
"""Bits -> instructions per weight of few rows, groups of 32 included: a tenth above what was counted."""


def shipped(target: str) -> list[Variant]:
    """Two tiles of every format."""
    return [variant for variant in weight_only_report.variants(target) if variant.rows == ROWS[variant.dtype]]


def sample(target: str) -> list[Variant]:
    """One of them, the other one on the next target; ``weight_only_report`` builds all."""
    found, turn = shipped(target), ahead.TARGETS.index(target)
    return [found[2 * place + (place + turn) % 2] for place in range(len(found) // 2)]


def check(variant: Variant) -> None:
    built = weight_only_report.build(variant)
    assert built.spilled == 0, variant.name
    assert built.shared <= configs.SHARED_LIMIT[variant.target], variant.name
    wanted = {
        # Matrix instruction, copies to shared memory in 16 bytes.
        "sm_80": (r"HMMA\.16816\.F32", r"LDGSTS\.E\S*\.128"),
        "sm_90": (r"HGMMA\.64x\d+x16\.F32", r"LDGSTS\.E\S*\.128"),
        "gfx942": (r"v_mfma_f32_(16x16x16|32x32x8)", r"(global|buffer)_load_dwordx4"),
    }[variant.target]
    for instruction in wanted:
        assert built.count(instruction) > 0, (variant.name, instruction)
    if variant.target != "gfx942" and variant.levels == "uniform" and variant.rows == 8:
        assert weight_only_report.cost(variant, built) < BUDGET[variant.bits], variant.name


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_four_bits_compile(target):
    check(next(variant for variant in shipped(target) if (variant.bits, variant.group_size) == (4, 128)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_format_compiles(target):
    for variant in sample(target):
        check(variant)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_writing_the_weight_out_compiles(target):
    variant = next(variant for variant in shipped(target) if variant.bits == 3)
    built = weight_only_report.build_dequantize(variant)
    assert built.spilled == 0
    assert built.count(r"STG\.E\S*\.128|global_store_dwordx4") > 0


def test_a_weight_costs_few_enough_instructions():
    """The budget of the notes in ``weight_only_report``, in the form that decodes: groups of 128, a symmetric grid."""
    variants = [v for v in shipped("sm_90") if (v.bits, v.group_size, v.dtype) == (4, 128, "fp16")]
    (variant,) = variants
    assert weight_only_report.cost(variant, weight_only_report.build(variant)) < 2.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "tokens", "grid"),
    [
        ("W4ZA16G128", 4096, 512, 1, (32, 2)),  # shared between programs
        ("W4ZA16G64", 1, 1, 40, (1, 1)),  # sizes of 1 become constants
        ("W2SA16GC", 200, 1000, 300, (4, 4)),  # written out
    ],
)
def test_what_is_launched_compiles(compiled_only, monkeypatch, scheme, rows, columns, tokens, grid):
    """The launch as it is made on a GPU: its arguments fit the kernel, in whatever way Triton specialises them."""
    launches = compiled_only(weight_only_kernels, "matmul_kernel", "dequantize_kernel")
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("sm_90", 132))
    layer = random_layer(scheme, rows, columns, bias=True, dtype=torch.bfloat16)
    packed = weight_only.pack(layer)
    assert packed is not None
    y = weight_only.run(torch.randn(tokens, columns, dtype=torch.bfloat16), layer, packed)
    assert y.shape == (tokens, rows)
    assert [launch.grid for launch in launches] == [grid]
