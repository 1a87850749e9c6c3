"""What packs keys and values, compiled for GPUs that are not there: nothing spills, all fits, products are on matrix
units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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

pytestmark = pytest.mark.skipif(not compat.AVAILABLE, reason="needs triton")


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run compiled is not looked at."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


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

    def __init__(self, kernel: Any, launches: list[tuple[int, ...]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.kernel.warmup(*arguments, grid=grid, **options)
            self.launches.append(grid)

        return launch


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "book", "shift"), [(2, "magnitudes", True), (1, "e8", False)])
def test_what_is_launched_compiles(monkeypatch, bits, book, shift):
    """The launch as it is made on a GPU, one sequence, one head and one chunk: sizes of 1 become constants."""
    launches: list[tuple[int, ...]] = []
    monkeypatch.setattr(compat.module("runtime.driver").driver, "_active", _H200(), raising=False)
    monkeypatch.setattr(kv_encode_kernels, "encode_kernel", _Compiled(kv_encode_kernels.encode_kernel, launches))
    coder = Coder(load(book, bits), 16, 8, shift=shift, rope=Rope((1.0, 0.1)))
    for shape in ((1, 1, 1, 16, 16), (2, 3, 2, 16, 16)):
        states = torch.zeros(shape, dtype=torch.bfloat16)
        kv_encode.encode(states, torch.arange(shape[2]), coder, mean_group(16))
    assert launches == [(1,), (12,)]
