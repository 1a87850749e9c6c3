"""What changes and rounds activations, compiled for GPUs that are not there: nothing spills, all fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.triton import (
    activation,
    activation_kernels,
    activation_report,
    ahead,
    compat,
    configs,
    fused,
    fused_kernels,
    transforms,
    transforms_kernels,
)
from quantkit.kernels.triton.activation_report import Variant
from quantkit.kernels.triton.fused import Norm
from quantkit.recipe import ActivationScheme

pytestmark = [
    pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton"),
    pytest.mark.usefixtures("nothing_kept"),
]

BUDGET = 18
"""Instructions of a thread for each number of a row that is rounded: a tenth above what was counted. An H200 has time
for 20 while it moves the 3 bytes."""
FUSED_BUDGETS = {"norm": 30, "gated": 38}
"""The same where a norm or a gate is computed on the way: an H200 has time for 60 and for 33 (9 and 5 bytes)."""
PRODUCTS = {"sm_80": r"HMMA\.16816\.F32", "sm_90": r"HGMMA\.64x\d+x16\.F32", "gfx942": r"v_mfma_f32_(16x16x16|32x32x8)"}


def check(variant: Variant, target: str) -> ahead.Built:
    built = activation_report.build(variant, target)
    assert built.spilled == 0, variant.name
    assert built.shared <= configs.SHARED_LIMIT[target], variant.name
    return built


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_rounding_compiles(target):
    built = check(activation_report.rounding(4096, "bf16"), target)
    # 16 bytes a load: 8 numbers.
    assert built.count(r"LDG\.E\S*\.128|(global|buffer)_load_dwordx4") > 0
    assert built.instructions.total() * 4 * (64 if target == "gfx942" else 32) < BUDGET * 4096 * (
        2 if target == "gfx942" else 1
    )


@pytest.mark.parametrize("kind", FUSED_BUDGETS)
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_norms_and_gates_compile(target, kind):
    make = {"norm": activation_report.normed, "gated": activation_report.gated}[kind]
    built = check(make(4096, "bf16"), target)
    read = {"norm": 3, "gated": 2}[kind]  # x, residual and weight; gate and up
    assert built.count(r"LDG\.E\S*\.128|(global|buffer)_load_dwordx4") >= read
    threads = 4 * (64 if target == "gfx942" else 32)
    budget = FUSED_BUDGETS[kind] * (2 if target == "gfx942" else 1)
    assert built.instructions.total() * threads < budget * 4096


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_kronecker_product_compiles(target):
    built = check(activation_report.product(target, 4096, "bf16"), target)
    assert built.count(PRODUCTS[target]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_third_variant_compiles(target):
    """Others on the next target; ``activation_report`` builds all."""
    for variant in list(activation_report.variants(target))[ahead.TARGETS.index(target) :: 3]:
        check(variant, target)


@pytest.fixture
def launches(compiled_only: Callable[..., list[Any]]) -> list[Any]:
    compiled_only(activation_kernels, "extent_kernel", "quantize_kernel")
    compiled_only(fused_kernels, "norm_kernel", "gated_kernel")
    return compiled_only(transforms_kernels, "token_kernel", "columns_kernel")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "scheme", "launched"),
    [
        (None, ActivationScheme(bits=8, symmetric=False), [("quantize_kernel", (3,))]),
        (None, ActivationScheme(granularity="tensor"), [("extent_kernel", (3,)), ("quantize_kernel", (3,))]),
        ((28, 32), ActivationScheme(bits=4), [("token_kernel", (3,))]),
        ((1, 33), ActivationScheme(bits=4), [("token_kernel", (3,))]),  # a size of 1 becomes a constant
        ((140, 32), ActivationScheme(bits=4), [("columns_kernel", (3, 1)), ("quantize_kernel", (3,))]),
    ],
)
def test_what_is_launched_compiles(launches, sides, scheme, launched):
    """The launch as it is made on a GPU: its arguments fit the kernels, in whatever way Triton specialises them."""
    columns = 40 if sides is None else sides[0] * sides[1]
    scale = torch.ones(columns, dtype=torch.bfloat16)
    x = torch.randn(3, columns, dtype=torch.bfloat16)
    if sides is None:
        activation.quantize(x, scheme, LayerInputs(scale=scale))
    else:
        left, right = (torch.eye(side, dtype=torch.bfloat16) for side in sides)
        transforms.quantize(x, scheme, LayerInputs(scale=scale, left=left, right=right))
    assert [launch[:2] for launch in launches] == launched


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 40])  # a size of 1 becomes a constant
@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
def test_norms_and_gates_that_are_launched_compile(launches, kind, columns):
    x, scheme = torch.randn(3, columns, dtype=torch.bfloat16), ActivationScheme(bits=8, symmetric=kind == "gemma")
    weight, bias = x[0], x[1] if kind == "layer" else None
    residual = None if kind == "gemma" else x
    fused.norm_quantize(x, Norm(kind, weight, bias, 1e-6), LayerInputs(shift=weight), scheme, residual, values=True)
    fused.gated_quantize(x, x, "gelu" if kind == "gemma" else "silu", LayerInputs(scale=weight), scheme)
    assert [launch[:2] for launch in launches] == [("norm_kernel", (3,)), ("gated_kernel", (3,))]
