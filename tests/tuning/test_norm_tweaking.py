"""Norm tweaking of single tiny blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import layer_format, round_to_nearest
from opened import Opened
from pydantic import ValidationError
from tiny_models import TINY, VOCABULARY
from torch import Tensor, nn

from quantkit.calibrate.streams import Streams
from quantkit.layers.simulate import simulate_inputs
from quantkit.tuning.interface import Situation, Tuned
from quantkit.tuning.norm_tweaking import Config, needs_reference, tune
from quantkit.tuning.norms import NormValues, find_norms
from quantkit.tuning.samples import Samples

SAMPLES, TOKENS = 12, 16
EASY = {"lr": 3e-3}


class Bench:
    """Block ``index`` of a tiny model, its linears rounded to 2 bits; makes situations."""

    def __init__(self, folder: Path, index: int = 1, *, scheme: str | None = "W2A16G32") -> None:
        self.model = Opened(folder)
        self.index = index
        self.scheme = scheme

    def rounded(self) -> nn.Module:
        block = self.model.block(self.index)
        linears = self.model.linears(self.index)
        if self.scheme is None:
            return block
        layer = layer_format(self.scheme)
        if layer.activations:
            simulate_inputs(block, dict.fromkeys(linears, layer), {}, self.model.skeleton.expert_names)
        for name, parameter in block.named_parameters():
            if parameter.dim() > 1:
                rounded = round_to_nearest(parameter.flatten(0, -2), layer, torch.float32).dequantize()
                parameter.data = rounded.view(parameter.shape)
            assert not parameter.requires_grad, name
        return block

    def situation(self, *, batch_size: int = 5, dtype: torch.dtype = torch.float32, **changes: Any) -> Situation:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
        streams = Streams(self.model.stream, ids, names=("float", "quantised"), batch_size=batch_size)
        for index in range(self.index):
            streams.advance(dict.fromkeys(("float", "quantised"), self.model.block(index)))
        block = self.model.block(self.index)
        targets = streams.new_states()
        for number in range(streams.batches):
            targets.replace(number, streams.run("float", number, block))
        tensors = self.model.skeleton.block_tensors(self.index)
        architecture = self.model.skeleton.architecture
        assert architecture is not None
        settings = {
            "index": self.index,
            "blocks": self.model.skeleton.num_blocks,
            "module": self.rounded(),
            "reference": block,
            "streams": streams,
            "targets": targets,
            "sites": self.model.skeleton.sites(self.index),
            "norm_offset": architecture.norm_offset,
            "stored_dtypes": dict.fromkeys(tensors, dtype),
            "seed": 0,
        }
        return Situation(**(settings | changes))


@pytest.fixture
def bench(tiny: Callable[..., Path]) -> Callable[..., Bench]:
    return lambda name="llama", *args, **settings: Bench(tiny(name), *args, **settings)


def check_better(tuned: Tuned, *groups: str) -> None:
    facts = tuned.facts
    assert facts["accepted"]
    for group in groups or ("train", "heldout"):
        before, after = facts["before"][group], facts["after"][group]
        assert after["distance"] < before["distance"], group
        assert after["mse"] <= before["mse"], group


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- what is tuned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_tunes_every_norm_of_every_architecture_and_nothing_else(bench, name):
    situation = bench(name).situation()
    before = state(situation.module)
    tuned = tune(situation, Config(**EASY, tries=8))
    check_better(tuned)
    norms = {
        f"{path}.{leaf}"
        for path, part in situation.module.named_modules()
        if "norm" in type(part).__name__.lower() and path.rpartition(".")[2] not in ("q_norm", "k_norm")
        for leaf, _ in part.named_parameters()
    }
    assert tuned.tensors.keys() == norms
    assert all(torch.equal(tensor, before[name]) for name, tensor in situation.module.state_dict().items())
    for name, tensor in tuned.tensors.items():
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert not tensor.is_inference()
        assert 0 < (tensor - before[name]).abs().max() < 0.2
    assert tuned.warning is None


def test_norms_of_queries_and_keys_are_asked_for(bench):
    situation = bench("qwen3").situation()
    names = tune(situation, Config(**EASY, include_qk_norm=True)).tensors.keys()
    assert {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} < names


def test_a_norm_without_weight_is_none_and_a_shared_one_is_tuned_once():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first_norm = self.second_norm = nn.LayerNorm(4)
            self.bare_norm = nn.LayerNorm(4, elementwise_affine=False)
            self.k_layernorm = nn.RMSNorm(4)
            self.linear = nn.Linear(4, 4)

    block = Block()
    paths = find_norms(block)
    assert paths == {"first_norm": ["first_norm", "second_norm"]}
    stored = {f"{path}.{leaf}": torch.float32 for path in ("first_norm", "second_norm") for leaf in ("weight", "bias")}
    norms = NormValues(block, paths, stored, offset=0.0, relative=True)
    delta = norms.zeros()
    assert delta.keys() == {"first_norm.weight", "first_norm.bias"}
    delta["first_norm.weight"][1] = 0.05
    changed = norms.changed(delta)
    assert changed.keys() == {"first_norm.weight", "second_norm.weight"}
    assert torch.equal(*changed.values())
    assert norms.changed_share(delta) == 1 / 8


def test_a_block_without_norms_is_said(bench):
    tuned = tune(bench().situation(stored_dtypes={}), Config())
    assert not tuned.tensors
    assert tuned.warning is not None
    assert "no norm with a weight" in tuned.warning


def test_values_are_relative_to_what_a_norm_multiplies_by(bench):
    situation = bench("gemma2").situation()
    paths = find_norms(situation.module)
    weight = next(f"{path}.weight" for path in paths)
    for offset in (0.0, 1.0):
        norms = NormValues(situation.module, paths, situation.stored_dtypes, offset=offset, relative=True)
        start = norms.start[weight]
        assert torch.equal(norms.at(norms.zeros())[weight], start)  # to the bit, also with an offset
        moved = norms.at({name: torch.full_like(d, 0.1) for name, d in norms.zeros().items()})
        torch.testing.assert_close(moved[weight] + offset, (start + offset) * torch.tensor(0.1).exp())
    norms = NormValues(situation.module, paths, situation.stored_dtypes, offset=1.0, relative=False)
    moved = norms.at({name: torch.full_like(d, 0.1) for name, d in norms.zeros().items()})
    torch.testing.assert_close(moved[weight], start + 0.1)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_delta_for_gives_the_scaled_and_shifted_norm(offset):
    norm = nn.Sequential()
    norm.add_module("norm", nn.LayerNorm(5))
    with torch.no_grad():
        norm.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.1, 30.0, 0.5]))
        norm.norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 20.0, 0.3]))
    stored = {"norm.weight": torch.float32, "norm.bias": torch.float32}
    norms = NormValues(norm, find_norms(norm), stored, offset=offset, relative=True)
    scale, shift = torch.linspace(0.8, 1.3, 5).double(), torch.linspace(-1, 1, 5).double()
    values = norms.at(norms.delta_for("norm", scale, shift))
    torch.testing.assert_close(values["norm.weight"] + offset, (norm.norm.weight.detach() + offset) * scale.float())
    torch.testing.assert_close(values["norm.bias"], (norm.norm.bias.detach() * scale + shift).float())


# --- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"iterations": 0}, {"lr": 0.0}], ids=["no pass", "no step"])
def test_no_training_no_change(bench, config):
    tuned = tune(bench().situation(), Config(**config))
    assert not tuned.tensors
    assert not tuned.facts["accepted"]
    assert tuned.warning is None


@pytest.mark.parametrize("preset", ["recommended", "faithful"])
@pytest.mark.parametrize("loss", ["dist_sq_std", "dist_abs_var", "mse"])
def test_a_block_that_lost_nothing_stays_as_it_is(bench, preset, loss):
    # In batches of one nothing is added up in another order than for the targets: the gradient is exactly 0.
    tuned = tune(bench(scheme=None).situation(batch_size=1), Config(preset=preset, loss=loss))
    assert not tuned.tensors
    assert tuned.facts["before"] == tuned.facts["after"]


@pytest.mark.parametrize("loss", ["dist_sq_std", "mse"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_finds_back_norms_that_were_changed(bench, name, loss):
    made = bench(name, scheme=None)
    situation = made.situation(batch_size=SAMPLES)
    generator = torch.Generator().manual_seed(3)
    offset, planted, error = situation.norm_offset, {}, {}
    for path in find_norms(situation.module):
        weight = situation.module.get_submodule(path).weight
        planted[f"{path}.weight"] = weight.detach().clone()
        weight.data = (offset + weight) * (0.9 + 0.2 * torch.rand(weight.shape, generator=generator)) - offset
        error[f"{path}.weight"] = (weight + offset) / (planted[f"{path}.weight"] + offset) - 1
    config = Config(
        loss=loss, mse_weight=0, normalise=False, skip_first=False, lr=1e-2, schedule=0,
        iterations=8, batch=1, limit=0.3, holdout=0,
    )  # fmt: skip
    tuned = tune(situation, config)
    measure = "mse" if loss == "mse" else "distance"
    assert tuned.facts["after"]["train"][measure] < tuned.facts["before"]["train"][measure] / 10
    if loss == "mse" and name != "gemma2":  # there the norms behind a norm's linears make up for each other
        for key, weight in planted.items():
            found = (tuned.tensors[key] + offset) / (weight + offset) - 1
            assert found.norm() < error[key].norm() / 5


@pytest.mark.parametrize("loss", ["dist_sq_std", "dist_abs_var", "mse", "kl"])
def test_every_loss_brings_the_block_closer_on_samples_it_never_saw(bench, loss):
    tuned = tune(bench("opt").situation(), Config(**EASY, loss=loss, tries=6))
    check_better(tuned)
    steps = 11  # 12 samples less one held out
    assert tuned.facts["max_delta"] <= 1.1 * tuned.facts["lr"] * steps
    assert tuned.facts["changed"] > 0.9


def test_the_learning_rate_grows_with_depth(bench):
    for index, expected in ((0, 1e-4), (1, 1e-4 * (1 + 3 / 2))):
        situation = bench(index=index).situation()
        facts = tune(situation, Config(lr=1e-4, schedule=3.0)).facts
        assert facts["tries"] == 1
        assert facts["lr"] == pytest.approx(expected)


def test_changes_stay_within_the_limit(bench):
    tuned = tune(bench().situation(), Config(**EASY | {"lr": 0.05}, limit=0.01, tries=1, holdout=0))
    assert tuned.facts["max_delta"] == pytest.approx(0.01)


def test_what_does_harm_on_samples_it_never_saw_is_not_taken(bench):
    wild = {"lr": 0.5, "limit": 1.0}
    fine = bench(scheme="W8A16G32")
    tuned = tune(fine.situation(), Config(**wild, tries=2))
    assert not tuned.tensors
    assert not tuned.facts["accepted"]
    assert tuned.facts["tries"] == 2
    assert tuned.facts["after"] == tuned.facts["before"]
    assert tuned.warning is None
    unguarded = tune(fine.situation(), Config(**wild, holdout=0))
    assert unguarded.facts["after"]["train"]["mse"] > unguarded.facts["before"]["train"]["mse"]
    careful = tune(bench(scheme="W4A16G32").situation(), Config(**wild, tries=10))
    check_better(careful)
    assert 2 < careful.facts["tries"] <= 10
    assert careful.facts["lr"] == pytest.approx(0.5 * 1.5 / 2 ** (careful.facts["tries"] - 1))


def test_judged_as_they_are_stored(bench):
    """What float32 would gain is lost in bfloat16, whose steps are larger than what training adds up to."""
    small = {"lr": 2e-5, "schedule": 0.0}
    check_better(tune(bench().situation(), Config(**small)))
    tuned = tune(bench().situation(dtype=torch.bfloat16), Config(**small))
    assert tuned.facts["changed"] < 0.05
    assert tuned.warning is not None
    assert "new values" in tuned.warning
    assert "float32" in tuned.warning


def test_bfloat16_norms_keep_what_was_gained(bench):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        # Values that bfloat16 can hold before, so that only the tuned ones are rounded.
        made = bench()
        situation = made.situation(dtype=dtype)
        for path in find_norms(situation.module):
            weight = situation.module.get_submodule(path).weight
            weight.data = weight.bfloat16().float()
        tuned = tune(situation, Config(**EASY | {"lr": 1e-2}))
        check_better(tuned)
        found[dtype] = tuned
    for tensor in found[torch.bfloat16].tensors.values():
        assert torch.equal(tensor, tensor.bfloat16().float())
    before = found[torch.float32].facts["before"]["train"]["distance"]
    exact, kept = (found[dtype].facts["after"]["train"]["distance"] for dtype in (torch.float32, torch.bfloat16))
    assert before - kept > 0.97 * (before - exact)


def test_the_same_again(bench):
    first, second = (tune(bench().situation(), Config(**EASY)) for _ in range(2))
    assert first.facts == second.facts
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    other = tune(bench().situation(seed=1), Config(**EASY))
    assert other.facts["before"]["heldout"] != first.facts["before"]["heldout"]


def test_faithful_is_the_authors_recipe_where_nothing_else_is_given(bench):
    config = Config(preset="faithful", lr=1e-4)
    assert (config.target, config.relative, config.holdout, config.mse_weight) == ("quantised", False, 0.0, 0.0)
    assert (config.lr, config.schedule, config.iterations, config.batch) == (1e-4, 5.0, 1, 1)
    assert Config(preset="faithful").lr == 1e-5
    tuned = tune(bench().situation(), config)
    assert tuned.facts["accepted"]
    assert "heldout" not in tuned.facts["before"]
    assert tuned.facts["after"]["train"]["distance"] < tuned.facts["before"]["train"]["distance"]
    assert tuned.facts["max_delta"] <= 1.1 * tuned.facts["lr"] * SAMPLES


# --- how it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "opt"])
def test_batches_are_memory_not_results(bench, name, monkeypatch):
    config = Config(**EASY, batch=3)
    found = [tune(bench(name).situation(batch_size=size), config).tensors for size in (1, 5, 12)]
    monkeypatch.setattr(Samples, "_can_be_cut", lambda samples: False)
    found.append(tune(bench(name).situation(batch_size=5), config).tensors)
    for other in found[1:]:
        for key, tensor in found[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_samples_run_by_themselves_give_what_they_give_in_their_batch(bench, name):
    situation = bench(name).situation()
    samples = Samples(situation.module, situation.streams, situation.targets, skip_first=1)
    assert samples._separable
    (part,) = samples.parts([6, 8])
    assert (part.batch, part.rows, part.samples) == (1, [1, 3], [6, 8])
    whole = situation.streams.run("quantised", 1, situation.module)
    outcome = samples.run(part, {})
    torch.testing.assert_close(outcome.output, whole[[1, 3]], rtol=1e-4, atol=1e-5)
    assert torch.equal(outcome.target, situation.targets.batch(1)[[1, 3]])
    assert outcome.mask.tolist() == [[False] + [True] * (TOKENS - 1)] * 2


def test_arguments_that_cannot_be_told_apart_are_left_whole(bench):
    """A block with an argument that has as many rows as the batch has samples, but none of them a sample's."""
    situation = bench().situation()
    module = situation.module
    factors = torch.linspace(0.5, 2, 5)
    forward = module.forward
    module.forward = lambda hidden, *args, odd, **kwargs: forward(hidden * odd[0], *args, **kwargs)
    for calls in situation.streams._calls:
        calls[situation.index][1]["odd"] = factors
    samples = Samples(module, situation.streams, situation.targets, skip_first=0)
    assert not samples._separable
    whole = situation.streams.run("quantised", 0, module)
    (part,) = samples.parts([2])
    torch.testing.assert_close(samples.run(part, {}).output, whole[[2]])


@pytest.mark.parametrize("inference", [False, True])
def test_works_on_blocks_made_in_inference_mode(bench, inference):
    with torch.inference_mode(inference):
        made = bench("qwen2_moe", scheme="W3A8G32")
        situation = made.situation()
        tuned = tune(situation, Config(**EASY))
        assert torch.is_inference_mode_enabled() == inference
    check_better(tuned)


def test_broken_samples_have_no_say(bench):
    def broken(number: int, target: bool) -> Tuned:
        situation = bench().situation(batch_size=1)
        states = situation.targets if target else situation.streams.states["quantised"]
        hidden = states.batch(number)
        if target:
            hidden[0, 3, 5] = torch.nan
        else:  # as the streams leave it
            situation.streams.broken[number] = 0
            hidden.zero_()
        states.replace(number, hidden)
        return tune(situation, Config(**EASY))

    by_target, by_input = (broken(7, target) for target in (True, False))
    check_better(by_target)
    assert by_target.facts == by_input.facts
    assert by_target.facts != tune(bench().situation(batch_size=1), Config(**EASY)).facts


def test_steps_that_are_not_finite_are_left_out(bench, monkeypatch):
    run, calls = Samples.run, []

    def sometimes_inf(samples: Samples, part: Any, values: Any) -> Any:
        outcome = run(samples, part, values)
        if outcome.output.requires_grad:
            calls.append(part)
            if len(calls) % 3 == 1:
                outcome.output.mul_(torch.inf)
        return outcome

    monkeypatch.setattr(Samples, "run", sometimes_inf)
    tuned = tune(bench().situation(), Config(**EASY))
    check_better(tuned)
    assert len(calls) == 11
    assert tuned.facts["skipped_steps"] == 4


def test_a_single_sample_cannot_be_learnt_from_and_judged(bench):
    situation = bench().situation(batch_size=1)
    situation.streams.broken.update(dict.fromkeys(range(1, SAMPLES), 0))
    tuned = tune(situation, Config(**EASY))
    assert not tuned.tensors
    assert tuned.warning is not None
    assert "no calibration sample is left" in tuned.warning


# --- closed form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["quantised", "float"])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_closed_form_brings_the_block_closer(bench, name, target):
    config = Config(target=target, closed_form="only", ridge=0.1)
    tuned = tune(bench(name).situation(), config)
    assert "tries" not in tuned.facts
    assert tuned.facts["closed_form_accepted"] == bool(tuned.tensors)
    if tuned.tensors:
        check_better(tuned, "heldout")
    both = tune(bench(name).situation(), Config(target=target, closed_form="init", ridge=0.1))
    check_better(both, "heldout")


def test_closed_form_needs_the_weights_as_they_were():
    assert not needs_reference(Config())
    assert needs_reference(Config(closed_form="only"))
    with pytest.raises(ValidationError, match="closed_form gives relative changes"):
        Config(closed_form="init", relative=False)
