"""What packs keys and values, compiled for GPUs that are not there: nothing spills, all fits, products are on matrix
units."""

from __future__ import annotations

import pytest
import torch

from quantkit.kernels.triton import (
    activation_report,
    ahead,
    compat,
    compile_report,
    configs,
    kv_encode,
    kv_encode_kernels,
    kv_encode_report,
)
from quantkit.kernels.triton.activation_report import Variant
from quantkit.kv.codebooks import load
from quantkit.kv.nsn_encode import Coder, mean_group
from quantkit.kv.rope import Rope

pytestmark = [
    pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton"),
    pytest.mark.usefixtures("nothing_kept"),
]


def check(variant: Variant, target: str) -> ahead.Built:
    built = activation_report.build(variant, target)
    assert built.spilled == 0, variant.name
    assert built.shared <= configs.SHARED_LIMIT[target], variant.name
    assert built.count(kv_encode_report.PRODUCTS[target]) > 0, variant.name
    return built


def test_keys_compile():
    variant = kv_encode_report.encoding(64, "bf16", mean_bits=8)
    built = check(variant, "sm_90")
    assert built.count(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128") > 0  # 8 keys at a time


def test_is_in_the_report_of_all_kernels():
    assert kv_encode_report in compile_report.REPORTS


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_variant_compiles(target):
    for variant in kv_encode_report.variants():
        check(variant, target)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "book", "shift"), [(2, "magnitudes", True), (1, "e8", False)])
def test_what_is_launched_compiles(compiled_only, bits, book, shift):
    """The launch as it is made on a GPU, one sequence, one head and one chunk: sizes of 1 become constants."""
    launches = compiled_only(kv_encode_kernels, "encode_kernel")
    coder = Coder(load(book, bits), 16, 8, shift=shift, rope=Rope((1.0, 0.1)))
    for shape in ((1, 1, 1, 16, 16), (2, 3, 2, 16, 16)):
        states = torch.zeros(shape, dtype=torch.bfloat16)
        kv_encode.encode(states, torch.arange(shape[2]), coder, mean_group(16))
    assert [launch.grid for launch in launches] == [(1,), (12,)]
