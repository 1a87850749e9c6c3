"""ASINQ: by its own loss never worse than SINQ or than nothing, and right where the formula says what is best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import fresh_logits
import pytest
import torch
from looked import CALIBRATION, check_reload, facts_of, gaussian, looking, toy, weights_of
from tiny_models import TINY
from torch import Tensor

import quantkit
from quantkit.quantizers import grid, rtn
from quantkit.transforms import asinq, sinq

Source = Callable[[str], Path]
SCALES, SINQ = asinq.Config(clip=False), sinq.Config()


def spread(gamma: float, columns: int = 256) -> tuple[Tensor, Tensor]:
    """(weight, x): columns of deviation c, inputs of deviation c**-gamma."""
    c = gaussian(columns, seed=3).exp()
    return gaussian(200, columns, seed=1) * c, gaussian(400, columns, seed=2) * c.pow(-gamma)


def output_loss(weight: Tensor, x: Tensor, t: Tensor, scheme: str) -> float:
    settings = weights_of(scheme, weight.shape[1])
    rounded = rtn.quantize(weight / t, settings, torch.float32, rtn.Config()).dequantize()
    return float(((x * t) @ rounded.t() - x @ weight.t()).square().sum() / (x @ weight.t()).square().sum())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_exponents_fit_how_inputs_go_with_weights(gamma: float) -> None:
    """About t = (c / a)**(1/2) is best: c**(1/2) for even inputs, c**(3/4) for a = c**(-1/2), c for a = 1 / c."""
    weight, x = spread(gamma)
    solution = asinq.solve(toy(weight, x, "W4A16G64"), SCALES)
    (fact,) = solution.facts
    t, c = solution.sites["hidden"].scale.log(), gaussian(256, seed=3)
    power = float(torch.linalg.lstsq(torch.stack([c, torch.ones(256)], 1), t[:, None]).solution[0])
    assert power == pytest.approx((1 + gamma) / 2, abs=0.26)  # the minimum is flat
    assert fact["loss"] <= min(fact["loss_sinq"], fact["loss_before"])
    assert fact["loss"] < 0.9 * fact["loss_before"]


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_recorded_losses_are_those_of_the_solution(repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are in the sample. Columns [kv_heads, repeats, head_dim] of repeated heads share t."""
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 1000)
    weight, x = spread(0.5, 64)
    solution = asinq.solve(toy(weight, x, repeats=repeats), SCALES)
    t = solution.sites["hidden"].scale
    assert t.shape == (64 // repeats,)
    columns = t.view(2, -1).repeat_interleave(repeats, 0).flatten()
    (fact,) = solution.facts
    assert fact["loss"] == pytest.approx(output_loss(weight, x, columns, "W3A16G32"), rel=1e-3)
    assert fact["loss_before"] == pytest.approx(output_loss(weight, x, torch.ones(64), "W3A16G32"), rel=1e-3)
    if repeats == 1:
        balanced = sinq.column_scale([weight], 32, SINQ)
        assert fact["loss_sinq"] == pytest.approx(output_loss(weight, x, balanced, "W3A16G32"), rel=1e-3)


@pytest.mark.parametrize("scheme", ["W3A16G32", "W4A16GC"])
def test_scales_are_centred_in_every_group(scheme: str) -> None:
    weight, x = spread(0.5, 72)  # a short last group
    x = x * torch.linspace(-3, 3, 72).exp()
    t = asinq.solve(toy(weight, x, scheme), SCALES).sites["hidden"].scale
    for part in grid.group_views(t[None], weights_of(scheme, 72).group_size):
        assert float(part.log().mean(-1).abs().max()) < 1e-4


def test_units_and_orders_do_not_matter() -> None:
    weight, x = spread(0.3, 64)

    def scale(weight: Tensor, x: Tensor) -> Tensor:
        return asinq.solve(toy(weight, x, "W3A16GC"), SCALES).sites["hidden"].scale

    t = scale(weight, x)
    torch.testing.assert_close(scale(8 * weight, x / 32), t)
    torch.testing.assert_close(scale(weight.flip(0, 1), x.flip(0, 1)), t.flip(0), rtol=1e-4, atol=0)


def test_channels_that_are_never_active_stay_in_range() -> None:
    weight, x = spread(0.0, 64)
    x[:, 7], x[:, 9] = 0, 1e-30
    t = asinq.solve(toy(weight, x), SCALES).sites["hidden"].scale
    assert bool(((t >= 1e-3) & (t <= 1e3)).all())


@pytest.mark.parametrize("tokens", [0, 31])
def test_without_inputs_it_is_sinq(tokens: int) -> None:
    weight, x = spread(0.0, 64)
    solution = asinq.solve(toy(weight, x[:tokens]), SCALES)
    torch.testing.assert_close(solution.sites["hidden"].scale, sinq.column_scale([weight], 32, SINQ))
    assert (solution.facts[0]["p"], solution.facts[0]["q"]) == (1, 0)


def test_columns_without_spread_are_left_alone() -> None:
    solution = asinq.solve(toy(torch.zeros(20, 64), gaussian(50, 64)), SCALES)
    assert all(bool((change.scale == 1).all()) for change in solution.sites.values())


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(source: Source, name: str) -> None:
    """Where SINQ's scales stay, these do; the float block is unchanged and nothing is worse off than without."""
    with looking(source(name), "W3A16G32") as looked:
        sites, linears = looked.block.sites, looked.linears
        for absorb in ("never", "auto"):
            config = asinq.Config(absorb=absorb, clip=False)
            assert asinq.online(sites, linears, config) == sinq.online(sites, linears, sinq.Config(absorb=absorb))
            solution = asinq.solve(looked.situation, config)
            assert set(solution.linears) <= set(asinq.online(sites, linears, config))
            fed = {name for site in sites if site.name in solution.sites for name in site.consumers}
            assert not fed & set(solution.linears)
            assert all(fact["loss"] <= min(fact["loss_before"], fact["loss_sinq"]) for fact in solution.facts)
            served = sum(fact["loss"] < fact["loss_before"] for fact in solution.facts)
            assert served >= 0.5 * len(solution.facts)
        looked.apply(solution)


def test_absorb_never_judges_every_linear_by_itself(source: Source) -> None:
    with looking(source("llama"), "W3A16G32") as looked:
        solution = asinq.solve(looked.situation, asinq.Config(absorb="never", clip=False))
        assert not solution.sites
        assert [fact["linear"] for fact in solution.facts] == sorted(looked.linears)
        q, k = (solution.linears[f"self_attn.{name}"] for name in ("q_proj", "k_proj"))
        assert not torch.equal(q, k)
        looked.apply(solution)


@pytest.mark.parametrize("absorb", ["auto", "never"])
def test_limits_are_those_of_the_scaled_weights(source: Source, absorb: Literal["auto", "never"]) -> None:
    with looking(source("llama"), "W2A16G32") as looked:
        solution = asinq.solve(looked.situation, asinq.Config(absorb=absorb))
        clips = {fact["linear"]: fact for fact in solution.facts if "clipped" in fact}
        assert set(clips) == set(solution.limits) == set(looked.linears) - {"self_attn.q_proj", "self_attn.k_proj"}
        looked.check_limits(looked.apply(solution), solution)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reloads(source: Source, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    quantkit.quantize(str(source(name)), output=out, method="asinq", scheme="W3A16G32", calibration=CALIBRATION)
    check_reload(out, tmp_path / "dense")
    scales = [fact for fact in facts_of(out) if "q" in fact]
    assert all(fact["loss"] <= min(fact["loss_before"], fact["loss_sinq"]) for fact in scales)
    assert any(fact["q"] > 0 for fact in scales)


def test_inputs_that_are_rounded_at_run_time(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(str(source("opt")), output=out, method="asinq", scheme="W4A8", calibration=CALIBRATION)
    scales = [fact for fact in facts_of(out) if "q" in fact]
    assert all(fact["loss"] <= min(fact["loss_before"], fact["loss_sinq"]) for fact in scales)
    before, after = (fresh_logits.logits_of("quantkit", folder) for folder in (source("opt"), out))
    assert (after - before).norm() < 0.5 * before.norm()
