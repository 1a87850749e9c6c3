"""Round to nearest against its own definition: every weight at the nearest level the stored scales can express."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats.quantized import NF4_LEVELS, QuantizedWeight
from quantkit.quantizers import grid, rtn
from quantkit.recipe import WeightScheme

MINMAX, MSE = rtn.Config(), rtn.Config(clip="mse")
SCHEMES = [
    *(WeightScheme(bits=b, symmetric=s, group_size=64) for b, s in itertools.product(range(2, 9), (True, False))),
    WeightScheme(bits=4, levels="nf4", group_size=64),
]
BITS = (2, 3, 4, 5, 6, 8)


def name(value: object) -> str:
    if isinstance(value, WeightScheme):
        return value.levels if value.levels == "nf4" else f"W{value.bits}{'S' if value.is_symmetric else 'Z'}"
    return str(value).removeprefix("torch.")


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def expand(values: Tensor, scheme: WeightScheme, columns: int) -> Tensor:
    """[rows, groups] -> [rows, columns]."""
    width = columns if scheme.group_size == -1 else scheme.group_size
    return values.float().repeat_interleave(width, dim=1)[:, :columns]


def every_level(quantised: QuantizedWeight, scheme: WeightScheme) -> Tensor:
    """[rows, columns, levels]: what each weight could have become with the scales and zero points that were chosen."""
    columns = quantised.codes.shape[1]
    scale = expand(quantised.scale, scheme, columns)
    if scheme.levels == "nf4":
        return NF4_LEVELS * scale[..., None]
    zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    if quantised.zero_point is not None:
        zero = expand(quantised.zero_point, scheme, columns)
    return (torch.arange(2**scheme.bits) - zero[..., None]) * scale[..., None]


def group_errors(weight: Tensor, quantised: QuantizedWeight, scheme: WeightScheme) -> Tensor:
    """Squared error of each group, float64 [rows, groups]."""
    squared = (quantised.dequantize() - weight).double().square()
    return torch.cat([part.sum(-1) for part in grid.group_views(squared, scheme.group_size)], dim=1)


def relative_error(weight: Tensor, scheme: WeightScheme, config: rtn.Config = MINMAX) -> float:
    dense = rtn.quantize(weight, scheme, torch.bfloat16, config).dequantize()
    return float((dense - weight).norm() / weight.norm())


@pytest.mark.parametrize("config", [MINMAX, MSE], ids=["minmax", "mse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_every_weight_takes_the_nearest_level(scheme: WeightScheme, config: rtn.Config) -> None:
    weight = random_weight(17, 100) * torch.logspace(-3, 3, 17)[:, None] + 0.3  # short last group, an offset
    quantised = rtn.quantize(weight, scheme, torch.bfloat16, config)
    best = (every_level(quantised, scheme) - weight[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((quantised.dequantize() - weight).abs(), best, rtol=1e-5, atol=1e-5)
    assert int(quantised.codes.max()) < 2**scheme.bits
    if quantised.zero_point is not None:
        assert int(quantised.zero_point.max()) < 2**scheme.bits


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.levels == "uniform"], ids=name)
def test_minmax_leaves_no_weight_more_than_half_a_step_away(scheme: WeightScheme) -> None:
    weight = random_weight(64, 128)
    quantised = rtn.quantize(weight, scheme, torch.float32, MINMAX)
    half_a_step = expand(quantised.scale, scheme, 128) / 2
    assert bool(((quantised.dequantize() - weight).abs() <= half_a_step * (1 + 1e-4)).all())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.levels == "uniform"], ids=name)
def test_the_textbook_range_is_no_better(scheme: WeightScheme) -> None:
    """(max - min) / (2**b - 1), symmetric absmax / (2**(b - 1) - 1/2); from 6 bits on the two are within 2 %."""
    weight = random_weight(256, 64)
    top, zero = 2**scheme.bits - 1, torch.tensor(2.0 ** (scheme.bits - 1))
    if scheme.is_symmetric:
        scale = weight.abs().amax(1, keepdim=True) / (top / 2)
    else:
        scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / top
        zero = (-weight.amin(1, keepdim=True) / scale).round()
    textbook = ((weight / scale).round() + zero).clamp(0, top).sub(zero) * scale
    ours = rtn.quantize(weight, scheme, torch.float32, MINMAX).dequantize()
    assert float((ours - weight).norm()) <= float((textbook - weight).norm()) * (1.02 if scheme.bits >= 6 else 1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("group_size", [64, -1])
def test_mse_is_never_worse_in_any_group(scheme: WeightScheme, group_size: int) -> None:
    scheme = scheme.model_copy(update={"group_size": group_size})
    weight = torch.distributions.StudentT(3.0).sample((40, 150))
    plain = group_errors(weight, rtn.quantize(weight, scheme, torch.bfloat16, MINMAX), scheme)
    searched = group_errors(weight, rtn.quantize(weight, scheme, torch.bfloat16, MSE), scheme)
    assert bool((searched <= plain * (1 + 1e-5)).all())
    if scheme.bits <= 3:
        assert float(searched.sum()) < 0.97 * float(plain.sum())


@pytest.mark.parametrize("config", [MINMAX, MSE], ids=["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_error_falls_with_every_bit(config: rtn.Config, symmetric: bool, group_size: int) -> None:
    weight = random_weight(64, 256)
    errors = [
        relative_error(weight, WeightScheme(bits=bits, symmetric=symmetric, group_size=group_size), config)
        for bits in BITS
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.007 if group_size == 32 else errors[-1] < 0.009


@pytest.mark.parametrize("alpha", [1e-5, 1e-2, 7.0, 1e4])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_scaling_the_weights_scales_the_result(scheme: WeightScheme, alpha: float) -> None:
    weight = random_weight(32, 128)
    one = rtn.quantize(weight, scheme, torch.float32, MINMAX)
    other = rtn.quantize(weight * alpha, scheme, torch.float32, MINMAX)
    assert int((one.codes != other.codes).sum()) <= 2  # ties that rounding in alpha * w moves
    torch.testing.assert_close(other.scale, one.scale * alpha, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [MINMAX, MSE], ids=["minmax", "mse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_powers_of_two_on_rows_come_through_exactly(scheme: WeightScheme, config: rtn.Config) -> None:
    weight = random_weight(33, 96)
    factor = torch.exp2(torch.arange(33).float() - 16)[:, None]
    one = rtn.quantize(weight, scheme, torch.bfloat16, config)
    other = rtn.quantize(weight * factor, scheme, torch.bfloat16, config)
    assert torch.equal(other.dequantize(), one.dequantize() * factor)


@pytest.mark.parametrize("config", [MINMAX, MSE], ids=["minmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_odd_groups(scheme: WeightScheme, dtype: torch.dtype, config: rtn.Config) -> None:
    weight = random_weight(8, 128)
    weight[0] = 0
    weight[1, :64] = 0
    weight[2] = 3.0  # constant
    weight[3] = -3.0
    weight[4, 5] = 1e4  # one huge entry
    weight[5] = 1e-9  # below float16's smallest number
    weight[6, 1:] = 0
    dense = rtn.quantize(weight, scheme, dtype, config).dequantize()
    assert bool(dense.isfinite().all())
    assert not dense[0].any()
    assert not dense[1, :64].any()
    assert not dense[6, 1:].any()
    assert bool((dense[5].abs() < 1e-6).all())
    torch.testing.assert_close(dense[2:4], weight[2:4], rtol=0.34 if scheme.bits == 2 else 0.2, atol=0)


def test_scales_beyond_float16_stay_finite() -> None:
    quantised = rtn.quantize(torch.full((2, 64), 1e7), WeightScheme(bits=4, group_size=64), torch.float16, MINMAX)
    assert bool((quantised.scale == torch.finfo(torch.float16).max).all())


@pytest.mark.parametrize("group_size", [8, 64, 128, -1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 100), (65, 172), (7, 1000), (5, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_shape_fits_the_container(rows: int, columns: int, group_size: int, symmetric: bool) -> None:
    scheme = WeightScheme(bits=4, symmetric=symmetric, group_size=group_size)
    quantised = rtn.quantize(random_weight(rows, columns), scheme, torch.bfloat16, MSE)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    assert quantised.codes.shape == (rows, columns)
    assert quantised.codes.dtype == torch.uint8
    assert quantised.scale.shape == (rows, groups)
    assert quantised.scale.dtype == torch.bfloat16
    if symmetric:
        assert quantised.zero_point is None
    else:
        assert quantised.zero_point is not None
        assert quantised.zero_point.shape == (rows, groups)
    assert quantised.dequantize().shape == (rows, columns)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_chunks_of_rows_do_not_show(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(50, 100)
    whole = rtn.quantize(weight, scheme, torch.bfloat16, MSE)
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 700)
    pieces = rtn.quantize(weight, scheme, torch.bfloat16, MSE)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scale, pieces.scale)


def test_the_weight_is_only_read() -> None:
    weight = random_weight(16, 128)
    before = weight.clone()
    for scheme in SCHEMES:
        rtn.quantize(weight, scheme, torch.bfloat16, MSE)
    assert torch.equal(weight, before)


def test_heavy_tails_decode_by_their_own_codebook() -> None:
    """Kurtosis around 20: the published code decodes such layers by another codebook than it encoded them with."""
    weight = torch.distributions.StudentT(4.5).sample((256, 256))
    assert relative_error(weight, WeightScheme(bits=4, levels="nf4", group_size=64)) < 0.15
    assert relative_error(weight, WeightScheme(bits=4, group_size=64)) < 0.2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    group_size=st.sampled_from([8, 16, 64, -1]),
    scheme=st.sampled_from(SCHEMES),
    magnitude=st.floats(-20, 15),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    config=st.sampled_from([MINMAX, MSE]),
    seed=st.integers(0, 1000),
)
def test_error_is_bounded_by_the_step(
    rows: int, columns: int, group_size: int, scheme: WeightScheme, magnitude: float, dtype: torch.dtype,
    config: rtn.Config, seed: int,
) -> None:  # fmt: skip
    """Whatever shape and unit: the error stays below what one level for everything, at zero, would leave."""
    scheme = scheme.model_copy(update={"group_size": group_size})
    weight = random_weight(rows, columns, seed) * 10.0**magnitude
    quantised = rtn.quantize(weight, scheme, dtype, config)
    dense = quantised.dequantize()
    assert bool(dense.isfinite().all())
    assert float((dense - weight).norm()) <= float(weight.norm()) * (1 + 1e-6)
