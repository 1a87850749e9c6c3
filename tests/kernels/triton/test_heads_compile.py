"""The kernels of single heads compiled for GPUs that are not there: nothing spills, all fits, matrix units are used."""

import pytest
import torch

from quantkit.kernels.triton import activation_report, ahead, compat, configs, heads, heads_kernels, heads_report
from quantkit.kernels.triton.heads_report import FEW, MANY

pytestmark = [
    pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton"),
    pytest.mark.usefixtures("nothing_kept"),
]

PRODUCTS = {"sm_80": r"HMMA\.16816\.F32", "sm_90": r"HG?MMA\S*\.F32", "gfx942": r"v_mfma_f32"}


def check(variant, target):
    built = activation_report.build(variant, target)
    assert built.spilled == 0, variant.name
    assert built.shared <= configs.SHARED_LIMIT[target], variant.name
    if variant.kernel is heads_kernels.turn_kernel:
        assert built.count(PRODUCTS[target]) > 0, variant.name


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_a_decoding_step_compiles(target):
    check(heads_report.turning(128, "bf16", FEW), target)
    check(heads_report.encoding(128, "bf16", FEW, 4), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_form_compiles(target):
    """A third of them on each target; the report builds all."""
    for variant in list(heads_report.variants(target))[ahead.TARGETS.index(target) :: 3]:
        check(variant, target)


def test_the_largest_heads_of_a_prompt_compile():
    check(heads_report.turning(256, "bf16", MANY, parts=2), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1, 128), (2, 1, 40, 80), (1, 1, 1, 1)])  # a stride of 1 becomes a constant
def test_what_is_launched_compiles(compiled_only, shape):
    """The launches as they are made on a GPU: arguments fit the kernels, in whatever way Triton specialises them."""
    launches = compiled_only(heads_kernels, "turn_kernel", "encode_kernel")
    x = torch.randn(shape, dtype=torch.bfloat16)
    heads.multiply(x, heads.matrix_of(torch.eye(shape[-1]) + 1e-3, torch.bfloat16))
    heads.encode(x, 3, False, 0.9, torch.tensor(0.9))
    heads.encode(x, 4, True, 1.0, 1.0)
    programs = x.shape[:3].numel()
    turned = ("turn_kernel", (-(-programs // 16), heads.tile(shape[-1], 1, product=True).dim // 64 or 1))
    assert [launch[:2] for launch in launches] == [turned, *[("encode_kernel", (programs,))] * 2]
