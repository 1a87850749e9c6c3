"""SINQ's column scales: what the iteration promises, and what a block's solution looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from situations import situation
from tiny_models import TINY
from torch import Tensor

from quantkit.models.block import Block, LinearInfo, Site
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.quantizers import grid, rtn
from quantkit.recipe import WeightScheme
from quantkit.transforms import sinq

Tiny = Callable[..., Path]
PAPER = sinq.Config()
W4, W3 = WeightScheme(bits=4, symmetric=False, group_size=64), WeightScheme(bits=3, group_size=64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed))


def spread(rows: int, columns: int, seed: int = 0, sigma: float = 1.0) -> Tensor:
    """A dense matrix with log-normal row and column factors."""
    row = (sigma * gaussian(rows, 1, seed + 1)).exp()
    column = (sigma * gaussian(1, columns, seed + 2)).exp()
    return gaussian(rows, columns, seed) * row * column


def imbalance(weight: Tensor, t: Tensor, group_size: int) -> float:
    """Worst group: largest over smallest column deviation after rows are brought to deviation 1; float64."""
    worst = 1.0
    for part in grid.group_views(weight.double() / t.double(), group_size):
        columns = (part / part.std(dim=-1, keepdim=True)).std(dim=0)
        worst = max(worst, float((columns.amax(-1) / columns.amin(-1)).max()))
    return worst


def reconstruct(weight: Tensor, scheme: WeightScheme, config: sinq.Config = PAPER) -> Tensor:
    t = sinq.column_scale([weight], scheme.group_size, config)
    return rtn.quantize(weight / t, scheme, torch.float32, rtn.Config()).dequantize() * t


def relative(error: Tensor, weight: Tensor) -> float:
    return float(error.norm() / weight.norm())


# --- the iteration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [256, 700, 2048])
@pytest.mark.parametrize("group_size", [64, 128])
def test_dense_matrices_end_balanced(rows: int, group_size: int) -> None:
    """700 and 2048 rows start from a sample of them."""
    weight = spread(rows, 256)
    t = sinq.column_scale([weight], group_size, PAPER)
    assert imbalance(weight, torch.ones(256), group_size) > 20
    assert imbalance(weight, t, group_size) < 1.01


@pytest.mark.parametrize("sweeps", [1, 2, 3, 8])
def test_more_sweeps_never_end_further_from_balance(sweeps: int) -> None:
    weight = torch.distributions.StudentT(3.0).sample((300, 192)) * (2 * gaussian(1, 192)).exp()
    start = imbalance(weight, torch.ones(192), 64)
    less = imbalance(weight, sinq.column_scale([weight], 64, sinq.Config(sweeps=sweeps)), 64)
    more = imbalance(weight, sinq.column_scale([weight], 64, sinq.Config(sweeps=sweeps + 2)), 64)
    assert more <= less * 1.001 <= start


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 80), columns=st.integers(1, 150), group_size=st.sampled_from([8, 64, -1]),
    sigma=st.floats(0, 3), zeros=st.floats(0, 0.9), magnitude=st.integers(-25, 25), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_matrix_gets_a_usable_scale(
    rows: int, columns: int, group_size: int, sigma: float, zeros: float, magnitude: int, seed: int
) -> None:
    weight = spread(rows, columns, seed, sigma) * 10.0**magnitude
    weight *= torch.rand(rows, columns, generator=generator(seed)) >= zeros
    t = sinq.column_scale([weight], group_size, PAPER)
    assert t.shape == (columns,)
    assert t.dtype == torch.float32
    assert bool(((t > 5e-4) & (t < 2e3)).all())
    for part in grid.group_views(t[None], group_size):
        assert float(part.log().mean(-1).abs().max()) < 1e-5


def test_gaussian_columns_keep_their_scale() -> None:
    """Only the sampling noise of a standard deviation over N rows is left, and rounding is as good as without."""
    weight = gaussian(1024, 256)
    t = sinq.column_scale([weight], 64, PAPER)
    assert float((t - 1).abs().max()) < 4 / (2 * 1024) ** 0.5
    plain = rtn.quantize(weight, W4, torch.float32, rtn.Config()).dequantize()
    assert relative(reconstruct(weight, W4) - weight, weight) < 1.02 * relative(plain - weight, weight)


def test_one_loud_column_does_not_hurt_the_others() -> None:
    weight = gaussian(512, 64)
    others = torch.arange(64) != 7
    calm = relative((reconstruct(weight, W4) - weight)[:, others], weight[:, others])
    weight[:, 7] *= 50
    sinq_error = relative((reconstruct(weight, W4) - weight)[:, others], weight[:, others])
    plain = rtn.quantize(weight, W4, torch.float32, rtn.Config()).dequantize()
    assert sinq_error < 1.05 * calm
    assert relative((plain - weight)[:, others], weight[:, others]) > 3 * sinq_error


@pytest.mark.parametrize("alpha", [1e-5, 3e-3, 1e4])
def test_the_unit_of_the_weights_does_not_matter(alpha: float) -> None:
    weight = spread(200, 128)
    one, other = reconstruct(weight, W3), reconstruct(weight * alpha, W3)
    step = (one - weight).abs().max()
    assert float(((other / alpha - one).abs() > 1e-4 * step).float().mean()) < 1e-3  # codes at a tie may flip


def test_powers_of_two_on_rows_come_through_exactly() -> None:
    weight = spread(150, 128)
    factor = torch.exp2(torch.randint(-12, 13, (150, 1), generator=generator(3)).float())
    assert torch.equal(reconstruct(weight * factor, W3), reconstruct(weight, W3) * factor)


def test_column_factors_go_into_t() -> None:
    weight = spread(400, 128, sigma=0.5)
    factor = 10 ** (4 * torch.rand(128, generator=generator(4)) - 2)  # 1e-2 .. 1e2
    config = sinq.Config(sweeps=12)
    before = sinq.column_scale([weight], 64, config)
    after = sinq.column_scale([weight * factor], 64, config)
    ratio = (after / before / factor).unflatten(0, (-1, 64))
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=0.02, atol=0)
    error = relative(reconstruct(weight, W3, config) - weight, weight)
    moved = reconstruct(weight * factor, W3, config) / factor
    assert relative(moved - weight, weight) < 1.03 * error


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = spread(700, 328)
    whole = sinq.column_scale([weight], 64, PAPER)
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 5000)
    pieces = sinq.column_scale([weight], 64, PAPER)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=0)
    codes = [rtn.quantize(weight / t, W3, torch.bfloat16, rtn.Config()).codes for t in (whole, pieces)]
    assert int((codes[0] != codes[1]).sum()) <= 1e-4 * weight.numel()


def test_the_number_of_threads_does_not_show() -> None:
    weight = spread(1500, 256)
    threads = torch.get_num_threads()
    codes = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            t = sinq.column_scale([weight], 64, PAPER)
            codes.append(rtn.quantize(weight / t, W3, torch.bfloat16, rtn.Config(clip="mse")).codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes[0], codes[1])


def test_several_matrices_count_as_one_stacked() -> None:
    parts = [spread(100, 96, 1), spread(30, 96, 2), spread(200, 96, 3)]
    torch.testing.assert_close(
        sinq.column_scale(parts, 64, PAPER), sinq.column_scale([torch.cat(parts)], 64, PAPER), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("heads", "repeats", "head_dim", "group_size"), [(2, 3, 16, 32), (3, 2, 24, 64), (2, 2, 8, -1), (4, 2, 64, 32)]
)
def test_repeated_heads_share_their_scale(heads: int, repeats: int, head_dim: int, group_size: int) -> None:
    """Columns whose factor is the same in every repeat: the tied t finds it as the free one does."""
    factor = gaussian(heads, head_dim, 5).exp()
    factor = factor / factor.log().mean().exp()
    weight = gaussian(600, heads * repeats * head_dim)
    weight *= factor[:, None].expand(heads, repeats, head_dim).flatten()
    t = sinq.column_scale([weight], group_size, PAPER, repeats, head_dim)
    assert t.shape == (heads * head_dim,)
    assert abs(float(t.log().mean())) < 1e-5
    free = sinq.column_scale([weight], group_size, PAPER).view(heads, repeats, head_dim)
    tied = t.view(heads, 1, head_dim)
    ratio = (free / tied).log()
    # up to a constant per group, which does not matter, and noise
    for part in grid.group_views(ratio.view(1, -1), group_size):
        assert float(part.std(-1).max()) < 0.05


def test_exponent() -> None:
    weight = spread(200, 64)
    t = sinq.column_scale([weight], 64, PAPER)
    torch.testing.assert_close(sinq.column_scale([weight], 64, sinq.Config(exponent=0.5)), t.sqrt(), rtol=1e-4, atol=0)
    assert torch.equal(sinq.column_scale([weight], 64, sinq.Config(exponent=0)), torch.ones(64))


# --- degenerate tiles ------------------------------------------------------------------------------------------------


def test_a_matrix_of_zeros_keeps_ones_and_stays_zero() -> None:
    weight = torch.zeros(40, 128)
    assert torch.equal(sinq.column_scale([weight], 64, PAPER), torch.ones(128))
    assert not reconstruct(weight, W4).any()


def test_dead_and_constant_columns_keep_their_scale() -> None:
    weight = spread(100, 64)
    clean = sinq.column_scale([weight], 64, PAPER)
    weight[:, 3] = 0
    weight[:, 4] = 0.25
    t = sinq.column_scale([weight], 64, PAPER)
    assert t[3] == 1
    assert 0.5 < t[4] < 2000  # its rows differ, so after row scaling it is not constant any more
    rest = torch.arange(64) > 4
    assert imbalance(weight[:, rest], t[rest], -1) < 1.05
    assert float((t / clean)[rest].log().std()) < 0.1
    assert not reconstruct(weight, W4)[:, 3].any()


def test_rows_of_zeros_have_no_say() -> None:
    weight = spread(100, 64)
    expected = sinq.column_scale([weight], 64, PAPER)
    padded = torch.cat([weight, torch.zeros(30, 64)])
    torch.testing.assert_close(sinq.column_scale([padded], 64, PAPER), expected, rtol=0.01, atol=0)
    assert not reconstruct(padded, W4)[100:].any()


def test_constant_rows_alone_leave_the_columns_as_they_are() -> None:
    weight = gaussian(50, 1).expand(50, 64).clone()
    assert torch.equal(sinq.column_scale([weight], 64, PAPER), torch.ones(64))


def test_one_huge_entry() -> None:
    weight = gaussian(64, 64)
    weight[10, 20] = 1e6
    t = sinq.column_scale([weight], 64, PAPER)
    assert bool(t.isfinite().all())
    error = (reconstruct(weight, W4) - weight)[torch.arange(64) != 10]
    assert relative(error, gaussian(64, 64)) < 0.2


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (2, 64), (5, 100), (31, 1), (8, 172)])
def test_awkward_shapes(rows: int, columns: int) -> None:
    dense = reconstruct(gaussian(rows, columns), W4)
    assert dense.shape == (rows, columns)
    assert bool(dense.isfinite().all())


# --- blocks ----------------------------------------------------------------------------------------------------------


def toy_block() -> Block:
    """norm -> a, b, router (not a linear); a -> c; d stands alone."""
    tensors = {
        "norm.weight": torch.ones(64),
        "a.weight": spread(48, 64, 1), "b.weight": spread(32, 64, 2), "router.weight": spread(4, 64, 3),
        "c.weight": spread(40, 48, 4), "d.weight": spread(40, 64, 5),
    }  # fmt: skip
    linears = tuple(LinearInfo(n, *tensors[f"{n}.weight"].shape, has_bias=False) for n in "abcd")
    sites = (Site("input", "norm", "norm", ("a", "b", "router")), Site("hidden", "linear", "a", ("c",)))
    return Block(0, "layers.0.", tensors, dict.fromkeys(tensors, torch.bfloat16), linears, sites)


def test_sites_share_and_the_rest_stays_online() -> None:
    block = toy_block()
    before = {name: tensor.clone() for name, tensor in block.tensors.items()}
    solution = sinq.solve(situation(block, {"a", "b", "c", "d"}), PAPER)
    assert set(solution.sites) == {"input", "hidden"}
    assert set(solution.linears) == {"d"} == set(sinq.online(block.sites, {"a", "b", "c", "d"}, PAPER))
    shared = sinq.column_scale([block.weight("a"), block.weight("b")], 64, PAPER)  # the router has no say
    assert torch.equal(solution.sites["input"].scale, shared)
    assert torch.equal(solution.linears["d"], sinq.column_scale([block.weight("d")], 64, PAPER))
    assert all(torch.equal(block.tensors[name], tensor) for name, tensor in before.items())


def test_a_site_without_a_quantised_consumer_is_left_alone() -> None:
    solution = sinq.solve(situation(toy_block(), {"b", "d"}), PAPER)
    assert set(solution.sites) == {"input"}
    assert set(solution.linears) == {"d"}


def test_absorb_never_keeps_every_scale_at_its_linear() -> None:
    block, config = toy_block(), sinq.Config(absorb="never")
    solution = sinq.solve(situation(block, {"a", "b", "c"}), config)
    assert not solution.sites
    assert set(solution.linears) == {"a", "b", "c"} == set(sinq.online(block.sites, {"a", "b", "c"}, config))
    assert torch.equal(solution.linears["b"], sinq.column_scale([block.weight("b")], 64, PAPER))


def test_scales_of_one_are_dropped() -> None:
    solution = sinq.solve(situation(toy_block(), {"a", "b", "c", "d"}), sinq.Config(exponent=0))
    assert not solution.sites
    assert not solution.linears


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name: str, tiny: Tiny) -> None:
    """Every linear is served once: by the site that feeds it or by itself."""
    checkpoint = Checkpoint.open(tiny(name))
    skeleton = Skeleton(load_config(tiny(name)), checkpoint)
    for index in range(skeleton.num_blocks):
        block = skeleton.read_block(index, checkpoint)
        linears = {info.name for info in block.linears}
        solution = sinq.solve(situation(block, linears, "W4A16G32"), PAPER)
        fed = {consumer for site in block.sites if site.name in solution.sites for consumer in site.consumers}
        assert fed & linears == linears - set(solution.linears)
        for site in block.sites:
            if site.kind == "none":  # nothing can be folded there
                continue
            assert solution.sites[site.name].scale.numel() * site.repeats == block.weight(site.consumers[0]).shape[1]
