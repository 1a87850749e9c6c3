"""Attention over packed keys and values, compiled for GPUs that are not there: nothing spills, all fits."""

from __future__ import annotations

import pytest
import torch

from quantkit.kernels.triton import ahead, compat, configs, kv_attention, kv_attention_kernels, kv_attention_report
from quantkit.kernels.triton.activation_report import Variant
from quantkit.kernels.triton.kv_attention_report import LOADS, PRODUCTS
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.nsnquant import Config, layer_kv
from quantkit.kv.rope import Rope

pytestmark = [
    pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton"),
    pytest.mark.usefixtures("nothing_kept"),
]

BUDGET = {"sm_80": 15.3, "sm_90": 15.3, "gfx942": 24.5}
"""Instructions of a thread for each pair of numbers, one of a key and one of a value, with 2 bits and heads of 128: a
tenth above what was counted. An H200 has time for 29 while it reads the two in 16 bits."""


def check(variant: Variant, target: str) -> ahead.Built:
    built = kv_attention_report.build(variant, target)
    assert built.spilled == 0, variant.name
    assert built.shared <= configs.SHARED_LIMIT[target], variant.name
    return built


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_it_compiles(target):
    """Codewords are loaded 16 bytes at a time and multiplied on matrix units."""
    variant = kv_attention_report.splitting(target)
    built = check(variant, target)
    assert built.count(PRODUCTS[target]) > 0
    assert built.count(LOADS[target]) >= 16
    assert kv_attention_report.cost(variant, built, target) < BUDGET[target]


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_putting_programs_together_compiles(target):
    check(kv_attention_report.merging(128), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_third_variant_compiles(target):
    """Others on the next target; ``kv_attention_report`` builds all."""
    for variant in list(kv_attention_report.variants(target))[ahead.TARGETS.index(target) :: 3]:
        check(variant, target)


@pytest.mark.slow
def test_what_is_launched_compiles(compiled_only, monkeypatch):
    """The launch as it is made on a GPU: its arguments fit the kernels, in whatever way Triton specialises them, and
    while a sequence grows nothing is compiled again."""
    launches = compiled_only(kv_attention_kernels, "split_kernel", "merge_kernel")
    monkeypatch.setattr(kv_attention, "_PROGRAMS", 64)
    rope = Rope(tuple(1e4 ** (-j / 32) for j in range(32)))
    for tokens, splits in ((3, 1), (4 + 16 + 1, 2), (4 + 16 + 12, 2), (4 + 5 * 16, 6)):
        layer = QuantisedLayer(layer_kv(Config(window=16, min_recent=0), 64, 64, rope))
        layer.update(torch.randn(1, 2, tokens, 64).half(), torch.randn(1, 2, tokens, 64).half())
        keys, values = (store.view() for store in layer.stores)
        mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
        kv_attention.attend(torch.randn(1, 4, 1, 64).half(), keys, values, mask, 0.125, 30.0)
        assert [launch.grid for launch in launches[-2:]] == [(2, splits), (4, 1)]
    compiled = [launch.compiled for launch in launches]
    assert compiled[2] is compiled[4] is compiled[6] is not compiled[0]
    assert compiled[3] is compiled[5] is compiled[7]
