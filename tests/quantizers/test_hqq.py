"""HQQ against what it minimises: never worse than its start, as good as trying everything, at a least squares fit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats.quantized import NF4_LEVELS, QuantizedWeight
from quantkit.quantizers import grid, hqq, rtn
from quantkit.recipe import WeightScheme

HQQ, MSE = hqq.Config(), rtn.Config(clip="mse")
SCHEMES = [
    *(WeightScheme(bits=b, symmetric=s, group_size=64) for b, s in itertools.product((2, 3, 4, 8), (True, False))),
    WeightScheme(bits=4, levels="nf4", group_size=64),
]


def name(value: object) -> str:
    if isinstance(value, WeightScheme):
        return value.levels if value.levels == "nf4" else f"W{value.bits}{'S' if value.is_symmetric else 'Z'}"
    return str(value)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_weight(rows: int, columns: int) -> Tensor:
    """Student's t with 4 degrees of freedom, and an offset in some rows."""
    normal, chi = random_weight(rows, columns), random_weight(rows, columns * 4, 1).unflatten(1, (-1, 4))
    return normal / chi.square().mean(-1).sqrt() + torch.arange(rows)[:, None] % 3 * 0.3


def group_errors(weight: Tensor, quantised: QuantizedWeight, norm: float = 2.0) -> Tensor:
    """Sum of |error|**norm of each group, float64 [rows, groups]."""
    errors = (quantised.dequantize() - weight).double().abs().pow(norm)
    return torch.cat([part.sum(-1) for part in grid.group_views(errors, quantised.group_size)], dim=1)


def relative_error(weight: Tensor, quantised: QuantizedWeight) -> float:
    """||W^ - W||**2 / ||W||**2."""
    return float((quantised.dequantize() - weight).square().sum() / weight.square().sum())


def level_codes(quantised: QuantizedWeight) -> Tensor:
    """What the codes stand for in units of the scale, float64 [rows, groups, width]."""
    if quantised.levels == "nf4":
        return NF4_LEVELS[quantised.codes.long()].double().unflatten(1, (quantised.groups, -1))
    codes = quantised.codes.double().unflatten(1, (quantised.groups, -1))
    zero = 2 ** (quantised.bits - 1) if quantised.zero_point is None else quantised.zero_point.double()[..., None]
    return codes - zero


@pytest.mark.parametrize("norm", [2.0, 1.0, 0.7])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_no_group_is_worse_than_its_start(scheme: WeightScheme, clip: str, norm: float) -> None:
    weight = heavy_weight(24, 150)
    start = rtn.quantize(weight, scheme, torch.bfloat16, rtn.Config(clip=clip))
    refitted = hqq.quantize(weight, scheme, torch.bfloat16, hqq.Config(clip=clip, norm=norm))
    before, after = group_errors(weight, start, norm), group_errors(weight, refitted, norm)
    assert bool((after <= before * (1 + 1e-5)).all())
    if scheme.bits < 8:  # a step of a bfloat16 scale is too coarse to gain anything there
        assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_scales_are_the_least_squares_fit_of_the_codes(scheme: WeightScheme) -> None:
    """With the codes as they are no scale loses less: scale = <levels, w> / <levels, levels>."""
    weight = heavy_weight(48, 128)
    quantised = hqq.quantize(weight, scheme, torch.float32, hqq.Config(iterations=200))
    levels, groups = level_codes(quantised), weight.double().unflatten(1, (2, -1))
    best = (levels * groups).sum(-1) / levels.square().sum(-1)
    # A group stops when the codes no longer change, or with the change that gains nothing.
    assert float(((quantised.scale.double() / best - 1).abs() < 1e-5).double().mean()) > 0.97
    torch.testing.assert_close(quantised.scale.double(), best, rtol=0.02, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_a_refit_with_fixed_codes_lowers_the_error_of_every_group(scheme: WeightScheme) -> None:
    """One iteration gives the scale that is best for the codes of the start."""
    weight = heavy_weight(60, 64)
    start = rtn.quantize(weight, scheme, torch.float32, rtn.Config())
    once = hqq.quantize(weight, scheme, torch.float32, hqq.Config(clip="minmax", neighbours=0, iterations=1))
    levels = level_codes(start)[:, 0]
    best = (levels * weight).sum(1) / levels.square().sum(1)
    taken = (once.scale != start.scale)[:, 0]
    assert int(taken.sum()) > 40  # the others got worse once their codes had followed
    torch.testing.assert_close(once.scale[taken, 0].double(), best[taken], rtol=1e-5, atol=0)
    refitted = (levels * best[:, None] - weight).square().sum(1)
    assert bool((refitted <= group_errors(weight, start)[:, 0]).all())


@pytest.mark.parametrize("norm", [1.0, 0.7])
@pytest.mark.parametrize("bits", [2, 3])
def test_shrinkage_serves_the_norm(bits: int, norm: float) -> None:
    """sum |error|**p falls well below that of the range search, which a least squares refit alone does not achieve."""
    weight, scheme = heavy_weight(128, 256), WeightScheme(bits=bits, symmetric=True, group_size=64)
    start = group_errors(weight, rtn.quantize(weight, scheme, torch.float32, MSE), norm).sum()
    config = hqq.Config(norm=norm)
    assert float(group_errors(weight, hqq.quantize(weight, scheme, torch.float32, config), norm).sum()) < 0.96 * start


def test_shrinkage() -> None:
    """sign(r) * max(|r| - |r|**(p - 1) / beta, 0): nothing below beta**(-1 / (2 - p)), 0 included."""
    residual = torch.tensor([-1.0, -0.3, -0.1, 0.0, 0.1, 0.2, 0.5])
    expected = [-0.9, 0.1 * 0.3**-0.3 - 0.3, 0.0, 0.0, 0.0, 0.2 - 0.1 * 0.2**-0.3, 0.5 - 0.1 * 0.5**-0.3]
    torch.testing.assert_close(hqq.shrink(residual, norm=0.7, beta=10.0), torch.tensor(expected))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits < 8 and s.levels == "uniform"], ids=name)
def test_nearly_as_good_as_trying_everything(scheme: WeightScheme) -> None:
    """Against the best of 200 scales, geometric from 1/20 to 2 of the range, with every zero point."""
    weight = random_weight(32, 128)
    groups, top = weight.unflatten(1, (2, -1)), 2**scheme.bits - 1
    widest = groups.abs().amax(-1, keepdim=True) / (top / 2)
    least = torch.full_like(widest, torch.inf)
    for zero in [2 ** (scheme.bits - 1)] if scheme.is_symmetric else range(top + 1):
        for share in torch.logspace(-1.3, 0.3, 200):
            levels = (groups / (share * widest)).round().add(zero).clamp(0, top) - zero
            error = (levels * (share * widest) - groups).square().sum(-1, keepdim=True)
            least = torch.minimum(least, error)
    ours = group_errors(weight, hqq.quantize(weight, scheme, torch.float32, HQQ))
    assert float(ours.sum()) < 1.005 * float(least.sum())


GAUSSIAN_TARGETS = {  # mean squared error of N(0, 1): bits, group, symmetric -> range search of the least squares
    (4, 64, False): 0.00760, (4, 64, True): 0.00902, (4, 128, False): 0.00901, (4, 128, True): 0.01017,
    (3, 64, False): 0.0310, (3, 64, True): 0.0358, (3, 128, False): 0.0348, (3, 128, True): 0.0381,
    (2, 64, False): 0.1261, (2, 64, True): 0.1427, (2, 128, False): 0.1358, (2, 128, True): 0.1460,
}  # fmt: skip


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GAUSSIAN_TARGETS)
def test_gaussian_weights(bits: int, group_size: int, symmetric: bool) -> None:
    """The table of a fine search (100 ranges, textbook definition): reached within 3 % by rtn, beaten by hqq."""
    weight = random_weight(512, 512)
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=group_size)
    target = GAUSSIAN_TARGETS[bits, group_size, symmetric]
    searched = relative_error(weight, rtn.quantize(weight, scheme, torch.float32, MSE))
    refitted = relative_error(weight, hqq.quantize(weight, scheme, torch.float32, HQQ))
    assert searched == pytest.approx(target, rel=0.03)
    assert refitted < searched
    if not symmetric:  # the neighbouring zero points: they matter most where there are few
        assert refitted < searched * {2: 0.985, 3: 0.997, 4: 0.997}[bits]


@pytest.mark.parametrize(("group_size", "target"), [(64, 0.00743), (128, 0.00815)])
def test_gaussian_weights_nf4(group_size: int, target: float) -> None:
    weight = random_weight(256, 512)
    scheme = WeightScheme(bits=4, levels="nf4", group_size=group_size)
    searched = relative_error(weight, rtn.quantize(weight, scheme, torch.float32, MSE))
    assert searched == pytest.approx(target, rel=0.03)
    assert relative_error(weight, hqq.quantize(weight, scheme, torch.float32, HQQ)) < 0.99 * searched


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fractional_zero_point_would_round_back(bits: int) -> None:
    """Why the published update, zero point += mean of codes - zero point - w / scale, has no place here."""
    for weight in (heavy_weight(64, 256), random_weight(64, 256).exp()):
        plain = rtn.quantize(
            weight, WeightScheme(bits=bits, symmetric=False, group_size=64), torch.float32, rtn.Config()
        )
        position = weight.double().unflatten(1, (4, -1)) / plain.scale.double()[..., None]
        assert bool(((level_codes(plain) - position).mean(-1).abs() < 0.5).all())


def test_the_unit_of_the_weights_has_no_influence_on_what_is_an_outlier() -> None:
    scheme, weight = WeightScheme(bits=3, symmetric=False, group_size=64), heavy_weight(32, 256)
    one, other = (hqq.quantize(w, scheme, torch.float32, hqq.Config(norm=0.7)) for w in (weight, weight * 2**-6))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale * 2**6)


def test_outliers_count_less_with_a_smaller_norm() -> None:
    """One large weight in a group: the error of the others falls with the norm."""
    weight = random_weight(64, 64)
    weight[:, 0] = 12
    scheme = WeightScheme(bits=3, symmetric=False, group_size=64)
    errors = []
    for norm in (2.0, 1.0, 0.7):
        dense = hqq.quantize(weight, scheme, torch.float32, hqq.Config(norm=norm)).dequantize()
        errors.append(float((dense - weight)[:, 1:].abs().mean()))
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_odd_groups(scheme: WeightScheme, dtype: torch.dtype) -> None:
    weight = random_weight(7, 128)
    weight[0] = 0
    weight[1, :64] = 0
    weight[2] = 3.0
    weight[3] = -3.0
    weight[4, 5] = 1e4
    weight[5] = 1e-9  # below float16's smallest number
    weight[6, 1:] = 0
    quantised = hqq.quantize(weight, scheme, dtype, HQQ)
    dense = quantised.dequantize()
    assert bool((quantised.scale > 0).all())
    assert bool(dense.isfinite().all())
    assert not dense[0].any()
    assert not dense[1, :64].any()
    assert not dense[6, 1:].any()
    assert bool((dense[5].abs() < 1e-6).all())
    torch.testing.assert_close(dense[2:4], weight[2:4], rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_zero_points_stay_codes(bits: int) -> None:
    """Groups far on one side of 0, which would fit better with a zero point outside."""
    weight = random_weight(20, 64) + torch.tensor([-4.0, 4.0]).repeat(10)[:, None]
    quantised = hqq.quantize(weight, WeightScheme(bits=bits, symmetric=False, group_size=64), torch.float32, HQQ)
    assert quantised.zero_point is not None
    assert sorted(quantised.zero_point.unique().tolist()) == [0, 2**bits - 1]


@pytest.mark.parametrize("group_size", [8, 64, -1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 100), (5, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_shape_fits_the_container(rows: int, columns: int, group_size: int, symmetric: bool) -> None:
    weight = random_weight(rows, columns)
    before = weight.clone()
    scheme = WeightScheme(bits=3, symmetric=symmetric, group_size=group_size)
    quantised = hqq.quantize(weight, scheme, torch.bfloat16, HQQ)
    assert torch.equal(weight, before)
    assert quantised.codes.dtype == torch.uint8
    assert quantised.scale.dtype == torch.bfloat16
    assert quantised.scale.shape == (rows, 1 if group_size == -1 else -(-columns // group_size))
    assert (quantised.zero_point is None) == symmetric
    assert quantised.dequantize().shape == (rows, columns)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_chunks_of_rows_do_not_show(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(50, 100)
    whole = hqq.quantize(weight, scheme, torch.bfloat16, HQQ)
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 700)
    pieces = hqq.quantize(weight, scheme, torch.bfloat16, HQQ)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scale, pieces.scale)


@settings(max_examples=40, deadline=None)
@given(
    columns=st.integers(1, 150),
    group_size=st.sampled_from([8, 64, -1]),
    scheme=st.sampled_from(SCHEMES),
    magnitude=st.floats(-20, 15),
    config=st.builds(
        hqq.Config,
        norm=st.sampled_from([2.0, 0.7]),
        neighbours=st.integers(0, 2),
    ),
    seed=st.integers(0, 1000),
)
def test_whatever_the_shape_and_unit_no_worse_than_rounding(
    columns: int, group_size: int, scheme: WeightScheme, magnitude: float, config: hqq.Config, seed: int
) -> None:
    scheme = scheme.model_copy(update={"group_size": group_size})
    weight = random_weight(4, columns, seed) * 10.0**magnitude
    start = group_errors(weight, rtn.quantize(weight, scheme, torch.bfloat16, MSE), config.norm)
    ours = group_errors(weight, hqq.quantize(weight, scheme, torch.bfloat16, config), config.norm)
    assert bool((ours <= start * (1 + 1e-5)).all())
