"""Static ranges: what the grid holds, at which end it is clipped, and the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.ranges import UNSEEN_ABSMAX, static_range
from quantkit.calibrate.statistics import InputStatistics, Want
from quantkit.kernels.reference import fake_quantize
from quantkit.recipe import ActivationScheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])


def static(**settings: Any) -> ActivationScheme:
    return ActivationScheme(granularity="tensor", dynamic=False, **settings)


def statistics(*batches: Tensor, want: tuple[Want, ...] = ("range", "tokens"), width: int = 24) -> InputStatistics:
    seen = InputStatistics(width, want)
    for x in batches:
        seen.update(x, tokens=torch.arange(len(x)), keys=torch.rand(len(x)))
    return seen


def rows(tokens: int = 400) -> Tensor:
    """Off centre, one channel further out than the others, one token far out."""
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0)) + 0.7
    x[:, 5] *= 4
    x[17] *= 30
    return x


def held(scheme: ActivationScheme, scale: Tensor, zero_point: Tensor | None) -> tuple[float, float]:
    """The smallest and the largest value of the grid."""
    ends = torch.tensor([-1e6, 1e6], dtype=scale.dtype if scale.dtype != torch.float16 else torch.float32)
    low, high = fake_quantize(ends, scheme, scale, zero_point).tolist()
    return low, high


@DTYPES
@SYMMETRIES
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_range_of_all_batches_is_held(bits, symmetric, dtype):
    x = rows()
    scheme = static(bits=bits, symmetric=symmetric)
    scale, zero_point = static_range(statistics(x[:100], x[100:], want=("range",)), scheme, dtype)
    assert (scale.shape, scale.dtype) == ((1,), dtype)
    assert (zero_point is None) == symmetric
    assert zero_point is None or (zero_point.shape, zero_point.dtype) == ((1,), torch.int8)
    low, high = held(scheme, scale, zero_point)
    step = float(scale)
    assert low <= float(x.min()) + step
    assert high >= float(x.max()) - step
    assert high - low < (2 * float(x.abs().max()) if symmetric else float(x.max() - x.min())) + step


def test_in_float32_it_is_the_grid_that_the_data_would_get_by_itself():
    x = rows()
    for symmetric in (True, False):
        scale, zero_point = static_range(statistics(x), static(symmetric=symmetric), torch.float32)
        dynamic = ActivationScheme(granularity="tensor", symmetric=symmetric)
        found = fake_quantize(x, static(symmetric=symmetric), scale, zero_point)
        assert torch.equal(found, fake_quantize(x, dynamic))


@SYMMETRIES
def test_a_quantile_leaves_outlying_tokens_out_and_no_other(symmetric):
    x = rows()
    scheme = static(symmetric=symmetric, quantile=0.99)
    reach = float(x.abs().amax(dim=1).sort().values[round(0.99 * 399)])
    assert reach < float(x.abs().max()) / 3
    scale, zero_point = static_range(statistics(x), scheme, torch.float32)
    _, high = held(scheme, scale, zero_point)
    assert high == pytest.approx(reach, abs=float(scale))
    ordinary = x[x.abs().amax(dim=1) <= reach]
    assert float((fake_quantize(ordinary, scheme, scale, zero_point) - ordinary).abs().max()) <= 1.01 * float(scale)


def test_with_a_zero_point_the_nearer_end_stays():
    x = rows().clamp(min=-0.5)
    scheme = static(symmetric=False, quantile=0.9)
    low, high = held(scheme, *static_range(statistics(x), scheme, torch.float32))
    assert low == pytest.approx(-0.5, abs=0.1)
    assert high == pytest.approx(statistics(x).token_quantile(0.9), rel=0.02)


@SYMMETRIES
@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_one_sign_use_all_codes_only_with_a_zero_point(symmetric, sign):
    x = sign * rows().abs()
    scheme = static(symmetric=symmetric)
    scale, zero_point = static_range(statistics(x), scheme, torch.float32)
    steps = 255 if not symmetric else 127.5
    assert float(scale) == pytest.approx(float(x.abs().max()) / steps, rel=1e-6)
    if zero_point is not None:
        assert int(zero_point) == (-128 if sign > 0 else 127)  # 0 is the first or the last code


@DTYPES
@SYMMETRIES
@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_an_input_that_no_token_reached(quantile, symmetric, dtype):
    scheme = static(symmetric=symmetric, quantile=quantile)
    scale, zero_point = static_range(statistics(), scheme, dtype)
    x = torch.linspace(-UNSEEN_ABSMAX, UNSEEN_ABSMAX, 99)
    assert float((fake_quantize(x, scheme, scale, zero_point) - x).abs().max()) <= 1.5 * float(scale) < 0.1


@DTYPES
@SYMMETRIES
def test_zeros_get_the_step_that_zeros_get_dynamically(symmetric, dtype):
    scheme = static(symmetric=symmetric)
    scale, zero_point = static_range(statistics(torch.zeros(3, 24)), scheme, dtype)
    assert float(scale) == torch.finfo(dtype).eps
    assert torch.equal(
        fake_quantize(torch.zeros(2, 24, dtype=dtype), scheme, scale, zero_point), torch.zeros(2, 24).to(dtype)
    )


@SYMMETRIES
def test_values_beyond_the_dtype_give_a_finite_step(symmetric):
    x = torch.full((2, 24), 3e38)
    x[1] = -3e38
    scheme = static(symmetric=symmetric)
    scale, zero_point = static_range(statistics(x), scheme, torch.float16)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(fake_quantize(torch.tensor([6e4, -6e4]).half(), scheme, scale, zero_point)).all()
