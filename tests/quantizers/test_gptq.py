"""GPTQ against its definition: the plainest possible version in float64, and the identities of its loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantkit.formats.quantized import QuantizedWeight
from quantkit.quantizers import gptq, grid, rtn
from quantkit.recipe import WeightScheme

ORDERS = ("natural", "activation", "group")
SCHEMES = [
    *(WeightScheme(bits=b, symmetric=s, group_size=64) for b, s in itertools.product((2, 4), (True, False))),
    WeightScheme(bits=4, levels="nf4", group_size=64),
    WeightScheme(bits=3, symmetric=False, group_size=-1),
]
W3, W4 = (WeightScheme(bits=b, symmetric=False, group_size=64) for b in (3, 4))
CLIP = rtn.Config(clip="mse", steps=24, smallest=0.2)
"""The search that gptq does."""


def round_by_gptq(weight, scheme, dtype, config, hessian, cross=None):
    """``hessian``: the matrix, or what ``factorise`` made of it."""
    try:
        factor = hessian if isinstance(hessian, gptq.Factor) else gptq.factorise(hessian, scheme.group_size, config)
    except gptq.HessianError as error:
        factor = error
    return gptq.quantize(weight, scheme, dtype, config, gptq.Prepared(factor, cross))


def name(value: object) -> str:
    if isinstance(value, WeightScheme):
        kind = value.levels if value.levels == "nf4" else f"W{value.bits}{'S' if value.is_symmetric else 'Z'}"
        return f"{kind}G{value.group_size}"
    return str(value)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, columns: int, seed: int = 0, rank: int = 32) -> Tensor:
    """Correlated and uneven: ``rank`` common factors, noise of variance 1, and log-normal (0.8) channel scales."""
    mixed = random_weight(tokens, rank, seed + 1) @ random_weight(rank, columns, seed + 2)
    noise = random_weight(tokens, columns, seed + 3)
    return (mixed + noise) * (0.8 * random_weight(1, columns, seed + 4)).exp()


def moments(x: Tensor, y: Tensor | None = None) -> Tensor:
    return 2 / len(x) * (x if y is None else y).t() @ x


def loss(weight: Tensor, quantised: QuantizedWeight, x: Tensor) -> float:
    """||X (W^ - W)^T||**2 / ||X W^T||**2."""
    return float((x @ (quantised.dequantize() - weight).t()).square().sum() / (x @ weight.t()).square().sum())


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    zeros = (one.zero_point, other.zero_point)
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.scale, other.scale)
        and (zeros[0] is zeros[1] if None in zeros else torch.equal(*zeros))
    )


def naive(
    weight: Tensor, hessian: Tensor, scheme: WeightScheme, order: Tensor, static: bool, clip: rtn.Config
) -> Tensor:
    """Round one column at a time; after each, solve for the best values of all that remain. float64 codes.

    The columns that remain minimise tr(E H E^T), E = what was rounded so far and what may still move, minus W. What an
    error in a column adds to that, once the later ones have moved, is its importance.
    """
    width, columns = scheme.group_size, weight.shape[1]
    importance = torch.empty(columns)
    for place in range(columns):
        left = order[place:]
        importance[order[place]] = 1 / torch.linalg.inv(hessian[left][:, left])[0, 0]
    current, codes, error = weight.clone(), torch.empty_like(weight), torch.zeros_like(weight)
    ranges = {}
    for place, column in enumerate(order.tolist()):
        group = column // width
        if group not in ranges:
            source = weight if static else current
            members = slice(group * width, (group + 1) * width)
            part = source[:, members].unsqueeze(1)
            scale, zero = rtn.find_range(part, scheme, torch.float32, clip, importance[None, members])
            ranges[group] = scale.flatten(), zero.flatten()
        scale, zero = ranges[group]
        codes[:, column] = rtn.nearest_codes(current[:, column] / scale, zero, scheme)
        error[:, column] = (codes[:, column] - zero) * scale - weight[:, column]
        done, left = order[: place + 1], order[place + 1 :]
        if place + 1 < columns:
            move = torch.linalg.solve(hessian[left][:, left], hessian[left][:, done] @ error[:, done].t())
            current[:, left] = weight[:, left] - move.t()
    return codes


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("group_size", [8, 24, 40])
@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_plain_algorithm(order: str, group_size: int, clip: str) -> None:
    weight, x = random_weight(12, 60).double(), inputs(200, 60).double()
    scheme = WeightScheme(bits=3, symmetric=False, group_size=group_size)
    config = gptq.Config(order=order, clip=clip, block=16)
    hessian = moments(x)
    factor = gptq.factorise(hessian, group_size, config)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    search = CLIP if clip == "mse" else rtn.Config()
    expected = naive(weight, damped, scheme, factor.order, order == "activation", search)
    assert torch.equal(round_by_gptq(weight, scheme, torch.float32, config, factor).weight.codes.double(), expected)


@pytest.mark.parametrize("config", [{"clip": "minmax"}, {"clip": "mse", "weighted": False}], ids=["minmax", "mse"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_is_rtn_when_inputs_are_uncorrelated(scheme: WeightScheme, order: str, config: dict[str, object]) -> None:
    weight = random_weight(20, 200)  # a short last group
    hessian = torch.diag(inputs(1, 200)[0].square())
    ours = round_by_gptq(weight, scheme, torch.bfloat16, gptq.Config(order=order, **config), hessian)
    clip = rtn.Config() if config["clip"] == "minmax" else CLIP
    assert same(ours.weight, rtn.quantize(weight, scheme, torch.bfloat16, clip))


@pytest.mark.parametrize("group_size", [8, 64, 96, -1])
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_do_not_show(order: str, group_size: int) -> None:
    weight, hessian = random_weight(16, 200).double(), moments(inputs(400, 200).double())
    scheme = WeightScheme(bits=3, symmetric=False, group_size=group_size)
    results = [
        round_by_gptq(weight, scheme, torch.float32, gptq.Config(order=order, block=block), hessian)
        for block in (200, 1, 32, 128)
    ]
    for other in results[1:]:
        assert same(other.weight, results[0].weight)
        assert other.loss == pytest.approx(results[0].loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_chunks_of_rows_do_not_show(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_weight(50, 200).double(), moments(inputs(400, 200).double())
    whole = round_by_gptq(weight, W3, torch.float32, gptq.Config(order=order), hessian)
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 128 * 7)
    pieces = round_by_gptq(weight, W3, torch.float32, gptq.Config(order=order), hessian)
    assert same(whole.weight, pieces.weight)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_reported_loss_is_the_quadratic_form(scheme: WeightScheme, order: str) -> None:
    weight, hessian = random_weight(16, 200).double(), moments(inputs(300, 200).double())
    result = round_by_gptq(weight, scheme, torch.float32, gptq.Config(order=order), hessian)
    damped = hessian + result.damping * hessian.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    error = result.weight.dequantize(torch.float64) - weight
    assert result.loss == pytest.approx(float((error @ damped * error).sum()) / 2, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_margins_on_correlated_inputs(bits: int) -> None:
    """Columns in order: at most 0.35 of plain rounding; by activation: at most 0.75 of that."""
    weight, x = random_weight(128, 256), inputs(4096, 256)
    scheme = WeightScheme(bits=bits, symmetric=False, group_size=128)
    plain = loss(weight, rtn.quantize(weight, scheme, torch.float32, rtn.Config()), x)
    by_order = {
        order: loss(weight, round_by_gptq(weight, scheme, torch.float32, config, moments(x)).weight, x)
        for order in ORDERS
        for config in [gptq.Config(order=order, clip="minmax")]
    }
    assert by_order["natural"] <= 0.35 * plain
    assert by_order["activation"] <= 0.75 * by_order["natural"]
    assert by_order["group"] <= 0.75 * by_order["natural"]
    searched = round_by_gptq(weight, scheme, torch.float32, gptq.Config(), moments(x)).weight
    assert loss(weight, searched, x) < 0.95 * by_order["activation"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_better_than_rtn_with_every_format(scheme: WeightScheme, order: str) -> None:
    weight, x = random_weight(64, 200), inputs(2000, 200)
    ours = round_by_gptq(weight, scheme, torch.bfloat16, gptq.Config(order=order), moments(x)).weight
    assert loss(weight, ours, x) < 0.6 * loss(weight, rtn.quantize(weight, scheme, torch.bfloat16, CLIP), x)


def test_eight_bits_are_nearly_exact() -> None:
    weight, x = random_weight(64, 256), random_weight(1024, 256, 5)
    scheme = WeightScheme(bits=8, symmetric=False, group_size=128)
    assert loss(weight, round_by_gptq(weight, scheme, torch.float32, gptq.Config(), moments(x)).weight, x) < 1e-4


def test_permuted_columns_give_the_permuted_result() -> None:
    """By activation, when groups stay groups."""
    weight, x = random_weight(24, 256).double(), inputs(600, 256).double()
    generator = torch.Generator().manual_seed(3)
    groups = torch.randperm(4, generator=generator)
    columns = torch.cat([64 * g + torch.randperm(64, generator=generator) for g in groups.tolist()])
    one = round_by_gptq(weight, W3, torch.float32, gptq.Config(), moments(x)).weight
    other = round_by_gptq(weight[:, columns], W3, torch.float32, gptq.Config(), moments(x[:, columns])).weight
    assert torch.equal(other.codes, one.codes[:, columns])
    assert torch.equal(other.scale, one.scale[:, groups])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_rows_are_independent(scheme: WeightScheme, order: str) -> None:
    weight, hessian = random_weight(24, 200), moments(inputs(400, 200))
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    factor = torch.exp2(torch.arange(24).float() - 12)[:, None]
    one = round_by_gptq(weight, scheme, torch.bfloat16, gptq.Config(order=order), hessian).weight
    other = round_by_gptq((weight * factor)[rows], scheme, torch.bfloat16, gptq.Config(order=order), hessian).weight
    assert torch.equal(other.codes, one.codes[rows])
    assert torch.equal(other.dequantize(), (one.dequantize() * factor)[rows])


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("order", ORDERS)
def test_inputs_that_were_never_active_are_rounded_to_nearest(order: str, damping: float) -> None:
    weight, x = random_weight(24, 200), inputs(400, 200)
    dead = torch.tensor([0, 5, 63, 64, 199])
    x[:, dead] = 0
    hessian = moments(x).double()
    mean = hessian.diagonal()[hessian.diagonal() > 0].mean()
    noisy = hessian.clone()
    noisy[dead, 100] = noisy[100, dead] = 0.01 * mean  # what rounding of large sums may leave beside a zero
    result = round_by_gptq(weight, W4, torch.float32, gptq.Config(order=order, damping=damping), noisy)
    assert result.damping == damping
    group = dead // 64
    scale, zero = result.weight.scale[:, group], result.weight.zero_point[:, group].float()
    nearest = (weight[:, dead] / scale).round().add(zero).clamp(0, 15)
    assert torch.equal(result.weight.codes[:, dead].float(), nearest)
    error = (result.weight.dequantize() - weight).double()
    error[:, dead] = 0
    damped = hessian + damping * mean * torch.eye(200, dtype=torch.float64)
    assert result.loss == pytest.approx(float((error @ damped * error).sum()) / 2, rel=1e-4)


def test_fewer_tokens_than_inputs() -> None:
    weight, x = random_weight(24, 200), inputs(50, 200)
    result = round_by_gptq(weight, W4, torch.bfloat16, gptq.Config(), moments(x))
    assert result.damping == 0.01
    assert loss(weight, result.weight, x) < loss(weight, rtn.quantize(weight, W4, torch.bfloat16, CLIP), x)


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    x = inputs(300, 64).double()
    vectors = torch.linalg.qr(random_weight(64, 64).double()).Q
    values = moments(x).diagonal().clone()
    values[0] = -0.05 * values.mean()
    hessian = vectors @ torch.diag(values) @ vectors.t()
    result = round_by_gptq(random_weight(8, 64), W4, torch.float32, gptq.Config(), hessian)
    assert result.fallback is None
    assert result.damping == 0.08
    without = round_by_gptq(random_weight(8, 64), W4, torch.float32, gptq.Config(damping=0), moments(x))
    assert without.damping == 0


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.eye(64).index_put((torch.tensor(3), torch.tensor(7)), torch.tensor(torch.nan)), "not finite"),
        (torch.zeros(64, 64), "no input was ever active"),
        (torch.eye(64) - 10 * torch.ones(64, 64).triu(1) - 10 * torch.ones(64, 64).tril(-1), "not positive definite"),
    ],
    ids=["nan", "zero", "indefinite"],
)
def test_a_hessian_that_cannot_be_used_leaves_rtn_and_the_reason(hessian: Tensor, reason: str) -> None:
    weight = random_weight(8, 64)
    result = round_by_gptq(weight, W4, torch.bfloat16, gptq.Config(), hessian)
    assert reason in result.fallback
    assert result.loss is result.damping is None
    assert same(result.weight, rtn.quantize(weight, W4, torch.bfloat16, rtn.Config(clip="mse")))


@pytest.mark.parametrize("order", ORDERS)
def test_the_factor_is_the_one_of_the_paper(order: str) -> None:
    """R^-1 is the upper Cholesky factor of the inverse, of the damped Hessian in processing order."""
    hessian = moments(inputs(400, 200).double())
    factor = gptq.factorise(hessian, 64, gptq.Config(order=order))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    damped = damped[factor.order][:, factor.order]
    assert torch.equal(factor.root, factor.root.triu())
    assert sorted(factor.order.tolist()) == list(range(200))
    torch.testing.assert_close(factor.root @ factor.root.t(), damped, rtol=1e-12, atol=1e-9)
    paper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(torch.linalg.inv(factor.root), paper, rtol=1e-9, atol=1e-12)


def test_orders() -> None:
    diagonal = torch.tensor([1.0, 4, 2, 8, 3, 9, 7, 6, 5, 10])
    hessian = torch.diag(diagonal)
    orders = {order: gptq.factorise(hessian, 4, gptq.Config(order=order)).order.tolist() for order in ORDERS}
    assert orders["natural"] == list(range(10))
    assert orders["activation"] == [9, 5, 3, 6, 7, 8, 1, 4, 2, 0]
    assert orders["group"] == [5, 6, 7, 4, 3, 1, 2, 0, 9, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_the_container_is_that_of_rtn_and_nothing_else_changes(scheme: WeightScheme, dtype: torch.dtype) -> None:
    weight, hessian = random_weight(9, 100), moments(inputs(300, 100))
    weight[3] = 0
    before = weight.clone(), hessian.clone()
    config = gptq.Config()
    ours = round_by_gptq(weight, scheme, dtype, config, hessian).weight
    shared = round_by_gptq(weight, scheme, dtype, config, gptq.factorise(hessian, scheme.group_size, config)).weight
    plain = rtn.quantize(weight, scheme, dtype, rtn.Config())
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert same(ours, shared)
    for mine, theirs in ((ours.codes, plain.codes), (ours.scale, plain.scale), (ours.zero_point, plain.zero_point)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine.shape, mine.dtype, mine.is_contiguous()) == (theirs.shape, theirs.dtype, True)
    assert bool(ours.dequantize().isfinite().all())
    assert not ours.dequantize()[3].any()


def test_weighted_range_search_is_never_worse_by_its_own_measure() -> None:
    weight, importance = random_weight(40, 64).unsqueeze(1), inputs(1, 64).square()
    for bits in (2, 3, 4):
        scheme = WeightScheme(bits=bits, symmetric=False, group_size=64)
        errors = []
        for clip in ("minmax", "mse"):
            scale, zero = rtn.find_range(weight, scheme, torch.bfloat16, rtn.Config(clip=clip), importance)
            levels = rtn.level_values(rtn.nearest_codes(weight / scale, zero, scheme), zero, scheme)
            errors.append(((levels * scale - weight).square() * importance).sum(-1))
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())


def drifting_inputs(tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Inputs in the quantised model and in the float model, which differ by a linear map and by noise."""
    exact = inputs(tokens, columns).double()
    drift = 0.1 * random_weight(columns, columns, 99).double() / columns**0.5
    return exact + exact @ drift + 0.05 * random_weight(tokens, columns, 7).double(), exact


def test_retargeted_weight_is_the_least_squares_answer() -> None:
    weight = random_weight(16, 96).double()
    x, exact = drifting_inputs(500, 96)
    config = gptq.Config(damping=0)
    factor = gptq.factorise(moments(x), 32, config)
    target = gptq.retargeted_weight(weight, moments(x, exact - x), factor, 1.0)
    torch.testing.assert_close(target, torch.linalg.lstsq(x, exact @ weight.t()).solution.t(), rtol=1e-6, atol=1e-6)
    nothing = torch.zeros(96, 96, dtype=torch.float64)
    assert torch.equal(gptq.retargeted_weight(weight, nothing, factor, 1.0), weight)
    assert torch.equal(gptq.retargeted_weight(weight, moments(x, exact - x), factor, 0.0), weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_retargeting_brings_held_out_outputs_closer_to_the_float_model(bits: int) -> None:
    weight = random_weight(64, 128).double()
    scheme = WeightScheme(bits=bits, symmetric=False, group_size=128)
    (x, held_x), (exact, held_exact) = (both.chunk(2) for both in drifting_inputs(2048, 128))
    hessian, cross = moments(x), moments(x, exact - x)
    errors = []
    for share in (0.0, 0.5, 1.0):
        result = round_by_gptq(weight, scheme, torch.float32, gptq.Config(retarget=share), hessian, cross)
        errors.append(float((held_x @ result.weight.dequantize(torch.float64).t() - held_exact @ weight.t()).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_retargeting_leaves_columns_of_dead_inputs() -> None:
    weight = random_weight(16, 96).double()
    x, exact = drifting_inputs(500, 96)
    x[:, 7] = 0
    factor = gptq.factorise(moments(x), 32, gptq.Config())
    cross = moments(x, exact - x)
    cross[:, 7] = 0.01
    target = gptq.retargeted_weight(weight, cross, factor, 1.0)
    assert torch.equal(target[:, 7], weight[:, 7])
    assert bool(target.isfinite().all())
