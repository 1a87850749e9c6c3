"""The integer kernels compiled for GPUs that are not there: nothing spills, all fits, integers are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import random_layer

from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import ahead, compat, configs, integer, integer_kernels, integer_report
from quantkit.kernels.triton.integer_report import Variant

pytestmark = pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton")

BUDGET = {8: 1.3, 4: 2.7, 2: 2.5}
"""Bits -> instructions per weight of few rows, groups of 32 apart: a tenth above what was counted."""


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run compiled is not looked at."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


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


class _H200:
    """As much of a driver as a launch asks before it has something to run."""

    def get_current_target(self) -> Any:
        return compat.module("backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """``kernel[grid](...)`` that compiles for what it is given, and stops there."""

    def __init__(self, kernel: Any, launches: list[tuple[str, tuple[int, int]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            options |= {"PTX": True} if "PTX" in options else {}
            self.kernel.warmup(*arguments, grid=grid, **options)
            self.launches.append((self.kernel.__name__, grid))

        return launch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "tokens", "grids"),
    [
        ("W4ZA8ZG128", 4096, 512, 1, [("matmul_kernel", (32, 2))]),  # shared between programs
        ("W8ZA8", 1, 1, 40, [("sums_kernel", (3, 1)), ("matmul_kernel", (1, 1))]),  # sizes of 1 become constants
        ("W8A8T", 4096, 1000, 2000, [("matmul_kernel", (256, 1))]),
    ],
)
def test_what_is_launched_compiles(monkeypatch, scheme, rows, columns, tokens, grids):
    """The launch as it is made on a GPU: its arguments fit the kernels, in whatever way Triton specialises them."""
    launches: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(compat.module("runtime.driver").driver, "_active", _H200(), raising=False)
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("sm_90", 132))
    for name in ("matmul_kernel", "sums_kernel"):
        monkeypatch.setattr(integer_kernels, name, _Compiled(getattr(integer_kernels, name), launches))
    layer = random_layer(scheme, rows, columns, bias=True, dtype=torch.bfloat16)
    packed = integer.pack(layer)
    assert packed is not None
    zero = None if layer.format.activations.symmetric else torch.zeros(tokens, 1)
    codes = InputCodes(torch.zeros(tokens, columns, dtype=torch.int8), torch.ones(1, 1).expand(tokens, 1), zero)
    assert integer.multiply(codes, packed, layer.bias, torch.bfloat16).shape == (tokens, rows)
    assert launches == grids
