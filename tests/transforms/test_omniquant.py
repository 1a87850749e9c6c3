"""OmniQuant: what is learned leaves the function, lowers the error of the rounded block, and is what is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from looked import CALIBRATION, check_reload, facts_of
from taught import check_resumed, scatter, taught
from tiny_models import TINY

import quantkit
from quantkit.learn import block, loop
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Solution

Source = Callable[[str], Path]


# --- one block -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_whatever_is_learned_leaves_the_function(source: Source, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(block, "train", scatter)
    with taught(source(name), "W4A4") as lesson:
        looked = lesson.looked
        solution = lesson.solve(query_key=True)
        assert {site.name for site in looked.block.sites} - {f"mlp.experts.{n}.hidden" for n in range(6)} <= set(
            solution.sites
        )
        changed = [change for change in solution.sites.values() if change.scale is not None]
        assert all(float(change.scale.log().std()) > 0.3 for change in changed)
        assert (solution.query_key is None) == name.startswith("gemma3")
        biased = {"opt", "bloom", "gpt_neox", "llama", "bert", "bert_classifier"}
        assert any(change.shift is not None for change in changed) == (name in biased)
        looked.apply(solution)


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("llama", "W2A16G32", {}),
        ("llama", "W4A4Z", {}),
        ("opt", "W4A4Z", {"query_key": True}),
        ("opt", "W2SA16GC", {"let": "always"}),
        ("bert", "W4A4Z", {"clip_start": "wide"}),
        ("mixtral", "WNF4A6Z", {}),
        ("qwen2", "W3A16G32", {"clip": False, "let": "always"}),
    ],
    ids=str,
)
def test_what_is_simulated_is_what_is_saved(source: Source, name: str, scheme: str, options: dict[str, Any]) -> None:
    """Inputs have a zero point: without one, the largest negative value of every token lies between two levels."""
    with taught(source(name), scheme) as lesson:
        target = lesson.looked.outputs(None)
        solution = lesson.solve(**options)
        (fact, *_) = solution.facts
        assert fact["accepted"]
        _, judges = loop.split(range(CALIBRATION["nsamples"]), 0.25, seed=0)
        assert fact["judged_by"] == len(judges) == 3
        module = lesson.carry_out(solution)
        assert lesson.loss(module, target, judges) == pytest.approx(fact["loss"], rel=1e-4)
        assert fact["loss"] < fact["loss_before"]


def test_training_lowers_the_error_of_samples_that_were_not_trained_on(source: Source) -> None:
    with taught(source("llama"), "W2A16G32") as lesson:
        fact = lesson.solve(epochs=15, lr_clip=0.05).facts[0]
    start, best = fact["learning"]["holdout"][0], fact["loss"]
    assert best < 0.97 * start
    assert best < 0.8 * fact["loss_before"]
    assert fact["learning"]["best_epoch"] > 3


def test_the_plain_rounding_is_the_one_to_beat(source: Source) -> None:
    """Learning rates that ruin everything, from a start that is worse than nothing."""
    with taught(source("llama"), "W4A4Z") as lesson:
        solution = lesson.solve(lr_let=5.0, lr_clip=5.0, alpha=1.0, clip_start="wide")
        plain = lesson.carry_out(Solution())
        fact = solution.facts[0]
        _, judges = loop.split(range(CALIBRATION["nsamples"]), 0.25, seed=0)
        assert math.isfinite(fact["loss_before"])
    with taught(source("llama"), "W4A4Z") as lesson:
        target = lesson.looked.outputs(None)
        assert lesson.loss(plain, target, judges) == pytest.approx(fact["loss_before"], rel=1e-4)
    if not fact["accepted"]:
        assert not solution.sites
        assert not solution.limits
    assert fact["loss"] <= fact["loss_before"]


def test_nothing_is_learned_where_nothing_is_lost(source: Source) -> None:
    """No linear is rounded, or their weights are all zero: the block is what it was."""
    with taught(source("llama"), "W4A4") as lesson:
        lesson.looked.situation = replace(lesson.looked.situation, linears=[])
        assert lesson.solve() == Solution()
    with taught(source("llama"), "W4A16") as lesson:
        for name in lesson.looked.linears:
            lesson.looked.block.tensors[f"{name}.weight"].zero_()
        lesson.looked.situation.observed.lesson(("quantised",)).targets.close()
        assert lesson.solve() == Solution()


def test_limits_are_for_rtn_and_signals_for_rounded_inputs(source: Source) -> None:
    with taught(source("llama"), "W3A16G32") as lesson:
        assert set(lesson.solve().limits) == set(lesson.looked.linears)
        assert not lesson.solve().sites
        said: list[str] = []
        lesson.looked.situation = replace(lesson.looked.situation, rounding="gptq", note=said.append)
        assert lesson.solve() == Solution()
        assert said == ["omniquant has nothing to learn in some blocks: see its options clip and let."]
    with taught(source("llama"), "W4A4") as lesson:
        lesson.looked.situation = replace(lesson.looked.situation, rounding="gptq")
        solution = lesson.solve()
        assert solution.sites
        assert not solution.limits


def test_the_same_seed_learns_the_same(source: Source) -> None:
    found = []
    for seed in (0, 0, 1):
        with taught(source("opt"), "W4A4") as lesson:
            lesson.looked.situation = replace(lesson.looked.situation, seed=seed)
            found.append(lesson.solve())
    first, second, third = found
    assert first.facts == second.facts != third.facts
    for name, change in first.sites.items():
        assert torch.equal(change.scale, second.sites[name].scale)
    for name, limits in first.limits.items():
        assert all(map(torch.equal, limits, second.limits[name]))


def test_the_block_and_its_module_are_left_as_they_were(source: Source) -> None:
    with taught(source("qwen3_moe"), "W4A4") as lesson:
        looked = lesson.looked
        before, tensors = looked.outputs(None), {n: t.clone() for n, t in looked.block.tensors.items()}
        observed = looked.situation.observed
        assert observed is not None
        lesson.solve(epochs=1)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in looked.block.tensors.items())
        assert torch.equal(looked.outputs(None), before)
        module = observed.lesson(("quantised",)).module
        assert not any(part._forward_pre_hooks for part in module.modules())


def test_queries_and_keys_are_scaled_by_powers_of_two(source: Source) -> None:
    with taught(source("opt"), "W4A4") as lesson:
        before = lesson.looked.block.weight("self_attn.q_proj").clone()
        t = torch.full((lesson.looked.block.query_key.width,), 4.0)
        state = Transformed(lesson.looked.block, lesson.looked.linears, torch.float32, pytest.fail)
        state.apply("method", Solution(query_key=t))
        assert torch.equal(lesson.looked.block.weight("self_attn.q_proj"), 4 * before)
        learned = lesson.solve(query_key=True).query_key
        assert torch.equal(learned.log2(), learned.log2().round())


def test_a_scale_of_queries_that_is_none_is_left_out(source: Source) -> None:
    with taught(source("opt"), "W4A4") as lesson:
        before = lesson.looked.block.weight("self_attn.q_proj").clone()
        said: list[str] = []
        state = Transformed(lesson.looked.block, lesson.looked.linears, torch.float32, said.append)
        state.apply("method", Solution(query_key=torch.full((lesson.looked.block.query_key.width,), torch.nan)))
        assert torch.equal(lesson.looked.block.weight("self_attn.q_proj"), before)
        assert "method found no finite numbers" in said[0]


# --- whole models ----------------------------------------------------------------------------------------------------

SAMPLES = {"nsamples": 9, "seqlen": 16, "batch_size": 4}


def steps(*following: str, **options: Any) -> list[dict[str, Any]]:
    return [{"method": "omniquant", "options": {"epochs": 1} | options}, *({"method": name} for name in following)]


@pytest.mark.parametrize("scheme", ["W3A16G32", "W4A4"])
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reloads(source: Source, tmp_path: Path, name: str, scheme: str) -> None:
    out = tmp_path / "out"
    recipe = {"scheme": scheme, "steps": steps("rtn")}
    quantkit.quantize(str(source(name)), output=out, recipe=recipe, calibration=SAMPLES)
    if scheme == "W3A16G32":
        check_reload(out, tmp_path / "dense")  # dense copies do not round inputs; that runs did is checked by runs
    blocks = [fact for fact in facts_of(out) if "learning" in fact]
    assert len(blocks) == 2
    assert all(0 < fact["loss"] <= fact["loss_before"] for fact in blocks)
    assert all(fact["learning"]["skipped_steps"] == 0 for fact in blocks)


def test_other_methods_before_and_behind(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chain = [{"method": "sinq"}, *steps("gptq", "norm-tweaking", aug_loss=True, let="always")]
    recipe = {"scheme": "W3A16G32", "steps": chain}
    quantkit.quantize(str(source("opt")), output=out, recipe=recipe, calibration=SAMPLES)
    check_reload(out, tmp_path / "dense")
    assert len([fact for fact in facts_of(out) if "learning" in fact]) == 2


def test_a_stopped_run_goes_on_to_the_same_bytes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"scheme": "W4A4", "steps": steps("rtn")}
    check_resumed(source("opt"), tmp_path, monkeypatch, recipe=recipe, calibration=SAMPLES)
