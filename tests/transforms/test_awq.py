"""AWQ: the scales and limits that the search chooses are no worse than none, and leave the function as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from looked import (
    CALIBRATION,
    check_reload,
    clamp,
    facts_of,
    gaussian,
    group_errors,
    looking,
    toy,
    weights_of,
)
from safetensors.torch import load_file
from tiny_models import TINY
from torch import Tensor

import quantkit
from quantkit.formats import writer
from quantkit.formats.quantized import NF4_LEVELS
from quantkit.kernels.reference import fake_quantize
from quantkit.models.block import Site
from quantkit.quantizers import grid, rtn
from quantkit.recipe import Scheme, WeightScheme
from quantkit.transforms import awq

Source = Callable[[str], Path]
QUICK = awq.Config(steps=10, search_tokens=120)


def plain_rounding(scheme: WeightScheme) -> Callable[[Tensor], Tensor]:
    return lambda weight: rtn.quantize(weight, scheme, torch.float32, rtn.Config()).dequantize()


# --- candidates ------------------------------------------------------------------------------------------------------


def test_candidates_follow_the_formulas() -> None:
    act, weight = gaussian(40, seed=1).exp(), gaussian(40, seed=2).exp().clamp(max=1)
    assert torch.equal(awq.candidate_scale(act, weight, 0.0, duo=False), torch.ones(40))
    for duo, expected in ((False, act**0.3), (True, act**0.3 / (weight**0.7 + 1e-4))):
        s = awq.candidate_scale(act, weight, 0.3, duo=duo)
        torch.testing.assert_close(s / s[0], expected / expected[0])
        assert float(s.amin() * s.amax()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(awq.candidate_scale(act * 1e-6, weight, 0.3, duo=duo), s)  # the unit of the input


def test_channels_without_input_or_weight_keep_their_scale() -> None:
    act, weight = gaussian(30, seed=1).exp(), gaussian(30, seed=2).exp().clamp(max=1)
    expected = awq.candidate_scale(act[2:], weight[2:], 0.5, duo=True)
    act[0], weight[1] = 0, 0
    s = awq.candidate_scale(act, weight, 0.5, duo=True)
    torch.testing.assert_close(s, torch.cat([torch.ones(2), expected]))
    assert torch.equal(awq.candidate_scale(torch.zeros(4), torch.ones(4), 0.5, duo=False), torch.ones(4))


def test_scales_stay_inside_float16() -> None:
    s = awq.candidate_scale(torch.tensor([1e-20, 1.0, 1e20]), torch.ones(3), 1.0, duo=False)
    torch.testing.assert_close(s, torch.tensor([1e-3, 1.0, 1e3]))


def test_heads_that_read_one_value_head_are_averaged() -> None:
    columns = torch.arange(2 * 3 * 4).float()  # [kv_heads, repeats, head_dim]
    site = Site("v", "linear", "v", ("o",), repeats=3, head_dim=4)
    assert awq.tied(site, columns).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert awq.tied(Site("n", "norm", "n", ("a",)), columns) is columns


@pytest.mark.parametrize("group_size", [16, -1])
def test_weight_share_is_the_mean_over_all_rows(monkeypatch: pytest.MonkeyPatch, group_size: int) -> None:
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 200)
    parts = [gaussian(30, 40, seed=1), gaussian(7, 40, seed=2)]
    parts[1][3] = 0
    rows = []
    for row in torch.cat(parts):
        groups = row.abs().split(16 if group_size == 16 else 40)
        rows.append(torch.cat([group / group.max().clamp(min=1e-30) for group in groups]))
    torch.testing.assert_close(awq.weight_share(parts, group_size), torch.stack(rows).mean(0))


# --- the search, on one linear behind another ------------------------------------------------------------------------


def toy_scale(weight: Tensor, x: Tensor, scheme: str = "W3A16G32") -> Tensor:
    solution = awq.solve(toy(weight, x, scheme), awq.Config(clip=False))
    return 1 / solution.sites["hidden"].scale


@pytest.fixture
def spread() -> tuple[Tensor, Tensor]:
    """(weight, x): columns of very different size, inputs that undo it."""
    factor = gaussian(64, seed=3).exp()
    return gaussian(96, 64, seed=1) * factor, gaussian(300, 64, seed=2) / factor


def test_spread_columns_are_evened_out(spread: tuple[Tensor, Tensor]) -> None:
    solution = awq.solve(toy(*spread), awq.Config(clip=False))
    (fact,) = solution.facts
    assert fact["site"] == "hidden"
    assert fact["loss"] < 0.3 * fact["loss_before"]
    evened = spread[0] / solution.sites["hidden"].scale
    assert float(evened.std(0).log().std()) < 0.3 * float(spread[0].std(0).log().std())
    assert not solution.limits


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_recorded_loss_is_that_of_the_solution(spread: tuple[Tensor, Tensor], repeats: int) -> None:
    """Also where two value heads are read twice each: columns [kv_heads, repeats, head_dim] share their scale."""
    (weight, x), rounded = spread, plain_rounding(weights_of("W3A16G32", 64))
    solution = awq.solve(toy(weight, x, repeats=repeats), awq.Config(clip=False))
    t = solution.sites["hidden"].scale.float()
    assert t.shape == (64 // repeats,)
    t = t.view(2, -1).repeat_interleave(repeats, 0).flatten()
    expected = ((x * t) @ rounded(weight / t).t() - x @ weight.t()).square().sum() / (x @ weight.t()).square().sum()
    assert solution.facts[0]["loss"] == pytest.approx(float(expected), rel=1e-3)
    assert solution.facts[0]["loss"] < solution.facts[0]["loss_before"]


def test_r_is_refined_beyond_the_grid(spread: tuple[Tensor, Tensor]) -> None:
    coarse = awq.solve(toy(*spread), awq.Config(steps=1, clip=False)).facts[0]
    fine = awq.solve(toy(*spread), awq.Config(steps=100, clip=False)).facts[0]
    assert coarse["loss"] <= coarse["loss_before"]
    assert fine["loss"] <= coarse["loss"] < 1.2 * fine["loss"]
    assert round(100 * fine["r"]) == pytest.approx(100 * fine["r"])


def test_units_and_orders_do_not_matter(spread: tuple[Tensor, Tensor]) -> None:
    weight, x = spread
    s = toy_scale(weight, x)
    torch.testing.assert_close(toy_scale(weight, 8 * x), s)
    torch.testing.assert_close(toy_scale(8 * weight, x), s)
    torch.testing.assert_close(toy_scale(weight.flip(0), x.flip(0)), s, rtol=1e-5, atol=0)
    per_row = toy_scale(weight, x, "W3A16GC")
    torch.testing.assert_close(toy_scale(weight.flip(1), x.flip(1), "W3A16GC"), per_row.flip(0), rtol=1e-5, atol=0)


def test_a_factor_common_to_all_columns_does_not_show() -> None:
    weight, s = gaussian(20, 64), gaussian(64, seed=1).exp()
    at = toy(weight, gaussian(5, 64), "W3A16GC")
    torch.testing.assert_close(at.rounded("c", weight * s * 0.37) / 0.37, at.rounded("c", weight * s))


@pytest.mark.parametrize("tokens", [0, 31, 32])
def test_an_expert_that_hardly_sees_tokens_is_left_alone(tokens: int) -> None:
    notes: list[str] = []
    at = toy(gaussian(16, 64), gaussian(tokens, 64) * gaussian(64).exp(), note=notes.append)
    solution = awq.solve(at, awq.Config(steps=2))
    assert bool(solution.sites) == bool(solution.limits) == bool(solution.facts) == (tokens == 32)
    assert notes == ([] if tokens == 32 else ["awq leaves inputs alone that fewer than 32 calibration tokens reach."])


def test_roundings_that_choose_their_range_get_no_limits(spread: tuple[Tensor, Tensor]) -> None:
    assert awq.solve(toy(*spread, "W2A16G32"), awq.Config(steps=1)).limits
    assert not awq.solve(toy(*spread, "W2A16G32", rounding="gptq"), awq.Config(steps=1)).limits


def test_rounded_inputs_take_part(spread: tuple[Tensor, Tensor]) -> None:
    """The loss is that of rounded weights and rounded inputs."""
    weight, x = spread
    activations = Scheme.parse("W8A4").activations
    assert activations is not None
    rounded = plain_rounding(weights_of("W8A4", 64))
    solution = awq.solve(toy(weight, x, "W8A4"), awq.Config(clip=False))
    t = solution.sites["hidden"].scale.float()
    output = fake_quantize(x * t, activations) @ rounded(weight / t).t()
    expected = (output - x @ weight.t()).square().sum() / (x @ weight.t()).square().sum()
    assert solution.facts[0]["loss"] == pytest.approx(float(expected), rel=1e-3)
    assert solution.facts[0]["loss"] <= solution.facts[0]["loss_before"]


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W2A16G32", "W2SA16G32", "W3A16GC", "W4SA16G64", "WNF4A16G32", "W3SA16G32"])
def test_limits_are_never_worse_than_none(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """72 columns: the last group is short. 5 tokens are fewer than a group is wide, 200 are more."""
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 1000)
    weight = torch.distributions.StudentT(3.0).sample((50, 72))
    settings, rounded = weights_of(scheme, 72), plain_rounding(weights_of(scheme, 72))
    width = 72 if settings.group_size < 0 else settings.group_size
    for tokens in (5, 200):
        x = gaussian(tokens, 72, seed=3) * gaussian(72, seed=4).exp() + 0.3
        found = awq.find_limits(weight, x, settings, rounded)
        before = group_errors(rounded(weight) - weight, x, width)
        after = group_errors(rounded(clamp(weight, found.low, found.high, width)) - weight, x, width)
        size = group_errors(weight, x, width).sum()
        assert bool((after <= before * (1 + 1e-4) + 1e-9).all())
        assert found.share > 0.2
        assert found.loss_before == pytest.approx(float(before.sum() / size), rel=1e-3)
        assert found.loss == pytest.approx(float(after.sum() / size), rel=1e-3)
        assert found.loss < 0.95 * found.loss_before


def test_one_end_alone_can_be_cut_off() -> None:
    """A weight that meets no input makes the range of its group too wide at one end."""
    generator = torch.Generator().manual_seed(0)
    weight, x = 2 * torch.rand(8, 32, generator=generator) - 1, gaussian(100, 32, seed=1)
    weight[:, 5], x[:, 5] = 1.7, 0.0
    found = awq.find_limits(weight, x, weights_of("W3A16G32", 32), plain_rounding(weights_of("W3A16G32", 32)))
    assert bool((found.high < 1.6).all())
    assert bool((found.low == -torch.inf).any())
    mirrored = awq.find_limits(-weight, x, weights_of("W3A16G32", 32), plain_rounding(weights_of("W3A16G32", 32)))
    assert bool((mirrored.low > -1.6).all())
    assert bool((mirrored.high == torch.inf).any())
    symmetric = weights_of("W4SA16G32", 32)
    assert float(awq.find_limits(weight, x, symmetric, plain_rounding(symmetric)).high.max()) < 1.6


def test_what_no_clipping_can_improve_keeps_its_range() -> None:
    scheme = weights_of("WNF4A16G32", 64)
    levels = NF4_LEVELS[torch.randint(0, 16, (10, 64), generator=torch.Generator().manual_seed(0))]
    levels[:, ::32], levels[:, 1::32] = -1.0, 1.0
    for weight in (levels, torch.zeros(4, 64)):
        found = awq.find_limits(weight, gaussian(50, 64), scheme, plain_rounding(scheme))
        assert found.share == found.loss == found.loss_before == 0
        assert bool((found.low == -torch.inf).all())


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(source: Source, name: str) -> None:
    """The float block is unchanged, no site is worse off, and limits mean the weights as they then are."""
    with looking(source(name), "W2A16G32") as looked:
        solution = awq.solve(looked.situation, QUICK)
        scales = [fact for fact in solution.facts if "r" in fact]
        clips = {fact["linear"]: fact for fact in solution.facts if "clipped" in fact}
        busy = {site.name for site in looked.block.sites if ".experts." not in site.name}
        assert busy <= {fact["site"] for fact in scales} <= {site.name for site in looked.block.sites}
        assert all(fact["loss"] <= fact["loss_before"] for fact in scales)
        assert sum(fact["r"] > 0 for fact in scales) >= 0.5 * len(scales)
        looked.check_limits(looked.apply(solution), solution)
        queries = [linear for linear in clips if linear.endswith(("q_proj", "k_proj", "query", "key", "qkv_proj"))]
        assert not queries
        assert "query_key_value" not in " ".join(clips)
        assert len(clips) >= len(looked.linears) - 2


def test_inputs_behind_gelu_are_scaled_online_if_asked(source: Source) -> None:
    with looking(source("bloom"), "W3A16G32") as looked:
        config = QUICK.model_copy(update={"online": True})
        alone = "mlp.dense_4h_to_h"
        assert awq.online(looked.block.sites, looked.linears, config) == {alone: {"scale"}}
        assert not awq.online(looked.block.sites, looked.linears, QUICK)
        solution = awq.solve(looked.situation, config)
        assert set(solution.linears) == {alone}
        fact = next(fact for fact in solution.facts if fact.get("linear") == alone)
        assert fact["loss"] < fact["loss_before"]
        looked.apply(solution)


def test_consumers_of_a_post_norm_are_announced(source: Source) -> None:
    with looking(source("bert"), "W3A16G32") as looked:
        found = awq.online(looked.block.sites, looked.linears, QUICK)
        assert set(found) == {"intermediate.dense", *(f"attention.self.{n}" for n in ("query", "key", "value"))}


# --- whole runs ------------------------------------------------------------------------------------------------------


def quick_steps(*methods: str) -> list[Any]:
    options = QUICK.model_dump(include={"steps", "search_tokens"})
    return [{"method": "awq", "options": options} if method == "awq" else method for method in methods]


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reloads(source: Source, tmp_path: Path, name: str) -> None:
    recipe = {"scheme": "W3A16G32", "steps": quick_steps("awq", "rtn"), "calibration": CALIBRATION}
    quantkit.quantize(str(source(name)), output=tmp_path / "out", recipe=recipe)
    check_reload(tmp_path / "out", tmp_path / "dense")
    facts = facts_of(tmp_path / "out")
    assert all(fact["loss"] <= fact["loss_before"] for fact in facts if "r" in fact)
    assert any(fact["clipped"] for fact in facts if "clipped" in fact)


def test_gptq_takes_over_from_the_scales(source: Source, tmp_path: Path) -> None:
    recipe = {"scheme": "W3A16G32", "steps": quick_steps("awq", "gptq"), "calibration": CALIBRATION}
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe)
    check_reload(tmp_path / "out", tmp_path / "dense")
    facts = facts_of(tmp_path / "out")
    assert all(fact["loss"] <= fact["loss_before"] for fact in facts)
    assert not any("clipped" in fact for fact in facts)


def test_inputs_that_are_rounded_at_run_time(source: Source, tmp_path: Path) -> None:
    recipe = {"scheme": "W4A8", "steps": quick_steps("awq", "rtn"), "calibration": CALIBRATION}
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe)
    facts = facts_of(tmp_path / "out")
    assert all(fact["loss"] <= fact["loss_before"] for fact in facts if "r" in fact)
    before, after = (fresh_logits.logits_of("quantkit", folder) for folder in (source("llama"), tmp_path / "out"))
    assert (after - before).norm() < 0.5 * before.norm()


@pytest.mark.parametrize("steps", [quick_steps("awq", "rtn"), ["asinq", "rtn"]], ids=["awq", "asinq"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Any]
) -> None:
    recipe = {"scheme": "W3A16G32", "steps": steps, "calibration": CALIBRATION}
    quantkit.quantize(str(source("llama")), output=tmp_path / "whole", recipe=recipe)

    def stop_at_the_second_block(self: Any, key: str, *rest: Any) -> None:
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(source("llama")), output=tmp_path / "stopped", recipe=recipe)
    monkeypatch.undo()
    quantkit.quantize(str(source("llama")), output=tmp_path / "stopped", recipe=recipe, resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
