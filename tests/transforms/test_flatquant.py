"""FlatQuant: what is learned leaves the function, lowers the error of the rounded block, and is what is saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from folded import Folded
from looked import CALIBRATION
from safetensors.torch import load_file
from taught import Taught, check_resumed
from taught import taught as taught_for
from test_pipeline import dense_copy, fresh
from test_rotated import rows, simulated_logits
from tiny_models import TINY, load_tiny, save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer
from torch import Tensor

import quantkit
from quantkit.errors import RecipeError
from quantkit.formats.inspect import inspect_checkpoint
from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import read_record
from quantkit.layers.simulate import simulate_inputs
from quantkit.learn import block, loop
from quantkit.models.block import Block
from quantkit.pipeline import prepare
from quantkit.presets import expand
from quantkit.recipe import WeightScheme
from quantkit.transforms import flatquant
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Solution

Source = Callable[[str], Path]
UNCOVERED = {"bloom", "gpt_neox", "bert", "bert_classifier"}
"""Tiny models with a linear behind GELU, which no site names."""
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
"""Tiny models in which a block may be left as it is: tokens may go to other experts whatever is done."""
ANY = LayerFormat(weights=WeightScheme(bits=4, group_size=-1, symmetric=True))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few channels that are much larger than the others, in weights made for them."""
    folder = tmp_path_factory.mktemp("outliers")
    save_tiny("llama", folder, vocab_size=VOCABULARY)
    save_tokenizer(folder)
    model = load_tiny(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[[3, 40]] *= 15
                for linear in readers:
                    linear.weight[:, [3, 40]] /= 10
    model.save_pretrained(folder)
    return folder


def taught(folder: Path, scheme: str) -> AbstractContextManager[Taught]:
    return taught_for(folder, scheme, flatquant)


def solve(lesson: Taught, **options: Any) -> Solution:
    """Of the first block, which both streams enter alike."""
    return lesson.solve(**({"inputs": "quantised"} | options))


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number is drawn at random behind the last step."""

    def scatter(groups: Any, *rest: Any) -> loop.Curve:
        generator = torch.Generator().manual_seed(0)
        for group in groups:
            for parameter in group.parameters:
                size = 0.5 if parameter.dim() < 3 else 0.5 * parameter.shape[-1] ** -0.5
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
        return loop.Curve(holdout=[0.0])

    monkeypatch.setattr(block, "train", scatter)


# --- the function stays ----------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: Folded, blocks: list[Block], state: Transformed) -> Tensor:
    """Of the float64 model with ``blocks``, the inputs of the first one changed as ``state`` says."""
    reloaded = load_tiny(model.folder, dtype=torch.float64, experts_implementation="eager")
    for own in blocks:
        module = model.skeleton.build_block(own.index, own.tensors, torch.float64)
        if own is state.block:
            simulate_inputs(module, dict.fromkeys(state.inputs, ANY), state.inputs, model.skeleton.expert_names)
        reloaded.get_submodule(model.skeleton.blocks_path)[own.index] = module
    with pytest.MonkeyPatch.context() as patch:  # BLOOM's softmax is in float32 whatever the dtype
        patch.setattr("torch.nn.functional.softmax", lambda x, dim=None, **_: torch.softmax(x, dim))
        result: Tensor = reloaded(torch.arange(24).view(2, 12) * 7 % 199, use_cache=False).logits
    return result


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def carried_out(model: Folded, solution: Solution, index: int = 0) -> tuple[list[Block], Transformed]:
    """The float64 blocks of a model with ``solution`` in one of them."""
    blocks = model.blocks()
    changed = blocks[index]
    state = Transformed(changed, [info.name for info in changed.linears], torch.float64, pytest.fail)
    if model.in_float32:  # its norms compute in float32: powers of two come through that exactly
        norms = {site.name for site in changed.sites if site.kind == "norm"}
        sites = {
            name: replace(change, scale=change.scale.log2().round().exp2()) if name in norms else change
            for name, change in solution.sites.items()
            if change.scale is not None
        }
        solution = replace(solution, sites=sites)
    state.apply("flatquant", solution)
    return blocks, state


@pytest.mark.usefixtures("scattered")
@pytest.mark.parametrize("name", TINY)
def test_whatever_is_learned_leaves_the_function(source: Source, name: str) -> None:
    with taught(source(name), "W4A4") as lesson:
        solution = solve(lesson)
        linears, sites = lesson.looked.linears, lesson.looked.block.sites
    assert solution.ops.keys() == solution.clips.keys() == set(linears)
    assert solution.matrices.keys() == {site.name for site in sites if site.head_dim}
    assert bool(solution.linears) == (name in UNCOVERED)
    assert solution.sites.keys() >= {"attention.input", "mlp.input"}
    conditions = [value for fact in solution.facts for key, value in fact.items() if key.startswith("condition")]
    assert len(conditions) >= 7
    assert all(1.5 < value < 1e4 for value in conditions)
    assert all(float(change.scale.log().std()) > 0.3 for change in solution.sites.values() if change.scale is not None)
    model = Folded(source(name))
    before = logits_of(model, model.blocks(), Transformed(model.block(0), [], torch.float64, pytest.fail))
    parts: dict[str, Solution] = {
        "sites": Solution(sites=solution.sites),
        "linears": Solution(linears=solution.linears),
        "matrices": Solution(matrices=solution.matrices),
        "ops": Solution(ops=solution.ops),
        "all": replace(solution, clips={}),  # of which there is nothing to see where nothing is rounded
    }
    for part, own in parts.items():
        blocks, state = carried_out(model, own)
        after = logits_of(model, blocks, state)
        assert relative(after, before) < 1e-10, part


@pytest.mark.usefixtures("scattered")
def test_nothing_that_was_rewritten_may_be_missing(source: Source) -> None:
    with taught(source("llama"), "W4A4") as lesson:
        solution = solve(lesson)
    model = Folded(source("llama"))
    nothing = Transformed(model.block(0), [], torch.float64, pytest.fail)
    before = logits_of(model, model.blocks(), nothing)
    blocks, state = carried_out(model, replace(solution, clips={}))
    changed, original = blocks[0], model.block(0)
    rewritten = [name for name, tensor in original.tensors.items() if not torch.equal(tensor, changed.tensors[name])]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    biases = ["self_attn.v_proj.bias"]  # values move with their matrices; biases of o, up and down stay
    assert set(rewritten) == {*(f"{name}.weight" for name in state.quantised), *norms, *biases}
    for name in rewritten:
        good, changed.tensors[name] = changed.tensors[name], original.tensors[name]
        assert relative(logits_of(model, blocks, state), before) > 1e-4, name
        changed.tensors[name] = good
    for name in state.quantised:
        op = state.inputs.pop(name)
        assert relative(logits_of(model, blocks, state), before) > 1e-3, name
        state.inputs[name] = op
    assert relative(logits_of(model, blocks, state), before) < 1e-10


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("llama", "W4A4", {}),
        ("llama", "W4A4ZB16", {"parameterisation": "svd"}),
        ("opt", "W4A4Z", {"matrices": False}),
        ("bert", "W4A4Z", {"clip_start": "wide"}),
        ("mixtral", "W4A6Z", {}),
        ("qwen2", "W3A16G32", {}),
    ],
    ids=str,
)
def test_what_is_simulated_is_what_is_saved(source: Source, name: str, scheme: str, options: dict[str, Any]) -> None:
    with taught(source(name), scheme) as lesson:
        target = lesson.looked.outputs(None)
        solution = solve(lesson, **options)
        fact = solution.facts[0]
        assert fact["accepted"]
        assert fact["loss"] < fact["loss_before"]
        assert bool(solution.clips) == ("A16" not in scheme)
        _, judges = loop.split(range(CALIBRATION["nsamples"]), 0.25, seed=0)
        module = lesson.carry_out(solution)
        assert lesson.loss(module, target, judges) == pytest.approx(fact["loss"], rel=2e-4)


def test_training_beats_rounding_and_fixed_rotations(outliers: Path) -> None:
    """On samples that were not trained on, in a block with outlier channels."""
    losses: dict[str, float] = {}
    for part, options in {
        "rotations": {"epochs": 0, "diagonal": False, "weight_clip": False, "activation_clip": False}
        | {"matrix_start": "hadamard"},
        "scaled": {"epochs": 0, "matrix_start": "hadamard"},
        "start": {"epochs": 0},
        "learned": {"epochs": 20, "patience": 20},
    }.items():
        with taught(outliers, "W4A4") as lesson:
            fact = solve(lesson, **options).facts[0]
            losses |= {part: fact["loss"], "rtn": fact["loss_before"]}
    assert losses["rotations"] < 0.6 * losses["rtn"]
    assert losses["start"] < losses["scaled"] < 0.3 * losses["rotations"]
    assert losses["learned"] < 0.9 * losses["start"]


def test_training_that_runs_away_leaves_a_sound_block(source: Source) -> None:
    with taught(source("llama"), "W4A4") as lesson:
        solution = solve(lesson, lr=30.0, lr_clip=30.0, epochs=4)
        fact = solution.facts[0]
        assert fact["loss"] <= fact["loss_before"]
        assert fact["learning"]["best_epoch"] == 0 or fact["learning"]["halvings"]
        lesson.looked.apply(solution)


def test_products_in_bfloat16(outliers: Path) -> None:
    with taught(outliers, "W4A4") as lesson:
        fact = solve(lesson, autocast=True, epochs=6, patience=6).facts[0]
    assert fact["learning"]["skipped_steps"] == 0
    assert fact["loss"] < 0.1 * fact["loss_before"]


def test_the_same_seed_learns_the_same(source: Source) -> None:
    found = []
    for seed in (0, 0, 1):
        with taught(source("qwen3"), "W4A4") as lesson:
            lesson.looked.situation = replace(lesson.looked.situation, seed=seed)
            found.append(solve(lesson, epochs=1))
    first, second, third = found
    assert first.facts == second.facts != third.facts
    for name, op in first.ops.items():
        assert torch.equal(op.left, second.ops[name].left)
        assert torch.equal(first.clips[name], second.clips[name])
        assert not torch.equal(op.left, third.ops[name].left)


def test_the_block_and_its_module_are_left_as_they_were(source: Source) -> None:
    with taught(source("qwen3_moe"), "W4A4") as lesson:
        looked = lesson.looked
        before, tensors = looked.outputs(None), {n: t.clone() for n, t in looked.block.tensors.items()}
        solution = solve(lesson, epochs=1)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in looked.block.tensors.items())
        assert torch.equal(looked.outputs(None), before)
        observed = looked.situation.observed
        assert observed is not None
        assert observed.lesson is not None
        module = observed.lesson(("quantised",)).module
        assert not any(part._forward_pre_hooks for part in module.modules())
    stored = [t for op in solution.ops.values() for t in vars(op).values()] + list(solution.clips.values())
    assert not any(tensor.requires_grad for tensor in stored if tensor is not None)


def test_experts_share_a_matrix_and_readers_a_clip(source: Source) -> None:
    with taught(source("mixtral"), "W4A4") as lesson:
        solution = solve(lesson, epochs=1)
    down = [solution.ops[f"mlp.experts.{n}.w2"] for n in range(5)]
    up = [solution.clips[f"mlp.experts.{n}.{leaf}"] for n in range(5) for leaf in ("w1", "w3")]
    attention = [solution.clips[f"self_attn.{leaf}_proj"] for leaf in "qkv"]
    for group in ([op.left for op in down], up, attention):
        assert all(torch.equal(group[0], other) for other in group)
    scales = [change.scale for name, change in solution.sites.items() if name.startswith("mlp.experts")]
    assert len(scales) >= 2
    assert not torch.equal(scales[0], scales[1])


@pytest.mark.parametrize("switch", ["matrices", "diagonal", "weight_clip", "activation_clip"])
def test_every_part_can_be_left_out(source: Source, switch: str) -> None:
    with taught(source("gpt_neox"), "W4A4") as lesson:
        options = flatquant.Config(**{switch: False})
        ops = flatquant.online(lesson.looked.block.sites, lesson.looked.linears, options)
        solution = solve(lesson, epochs=0, **{switch: False})
    found = {
        "matrices": bool(solution.ops or solution.matrices),
        "diagonal": bool(solution.sites or solution.linears),
        "weight_clip": bool(solution.limits),
        "activation_clip": bool(solution.clips),
    }
    assert found == {part: part != switch for part in found}
    second = {"kronecker": "matrices", "scale": "diagonal", "clip": "activation_clip"}
    assert ops["mlp.dense_4h_to_h"] == {op for op, part in second.items() if part != switch}
    assert ops["attention.query_key_value"] == ops["mlp.dense_4h_to_h"] - {"scale"}


def test_nothing_is_learned_where_nothing_is_lost_or_asked_for(source: Source) -> None:
    with taught(source("llama"), "W4A16") as lesson:
        for name in lesson.looked.linears:
            lesson.looked.block.tensors[f"{name}.weight"].zero_()
        assert solve(lesson) == Solution()
    with taught(source("llama"), "W4A4") as lesson:
        said: list[str] = []
        lesson.looked.situation = replace(lesson.looked.situation, rounding="gptq", note=said.append)
        assert not solve(lesson, epochs=1).limits  # gptq chooses its ranges itself
        assert solve(lesson, matrices=False, diagonal=False, activation_clip=False) == Solution()
        assert said == [
            "flatquant has nothing to learn in some blocks: see its options matrices, diagonal, weight_clip, "
            "activation_clip and keys."
        ]


def test_static_activations_are_not_clipped(source: Source) -> None:
    with taught(source("llama"), "W4A8TS") as lesson:
        solution = solve(lesson, epochs=1)
    assert solution.ops
    assert not solution.clips


def test_the_faithful_preset_gives_way_to_options() -> None:
    config = flatquant.Config(preset="faithful", epochs=3)
    assert (config.epochs, config.parameterisation, config.matrix_start, config.holdout) == (3, "svd", "cayley", 0.0)
    assert config.patience > 15
    assert (config.optimiser, config.betas) == ("adam", (0.9, 0.999))
    assert flatquant.Config().matrix_start == "balanced"


# --- whole models ----------------------------------------------------------------------------------------------------

SAMPLES = {"nsamples": 9, "seqlen": 16, "batch_size": 4}


def request(scheme: str = "W4A4", *following: str, **options: Any) -> dict[str, Any]:
    steps = [{"method": "flatquant", "options": {"epochs": 1} | options}, *({"method": name} for name in following)]
    return {"recipe": {"scheme": scheme, "steps": steps}, "calibration": SAMPLES}


@pytest.fixture(scope="module")
def outputs(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny model -> a checkpoint of it."""
    root = tmp_path_factory.mktemp("outputs")
    for name in TINY:
        quantkit.quantize(str(source(name)), output=root / name, **request("W4A4", "rtn"))
    return {name: root / name for name in TINY}


@pytest.fixture(scope="module")
def reloaded(outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Tiny model -> logits of its checkpoint in another process."""
    return fresh("native", list(outputs.values()), tmp_path_factory.mktemp("logits") / "all")


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reloads(
    outputs: dict[str, Path], reloaded: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    found = fresh_logits.logits_of("quantkit", outputs[name])
    assert torch.equal(reloaded[name], found)
    torch.testing.assert_close(simulated_logits(outputs[name], tmp_path / "simulated"), found, rtol=1e-4, atol=1e-4)
    events = [event for event in read_record(outputs[name] / "quantkit-run.jsonl") if event.get("transforms")]
    assert len(events) == 2
    changed = []
    for event in events:
        fact = event["transforms"][0]
        assert 0 < fact["loss"] <= fact["loss_before"]
        assert fact["learning"]["skipped_steps"] == 0
        changed += [fact["accepted"]] * len(event["layers"])
        for row in event["layers"]:
            assert row["format"]["input_op"] == ("kronecker" if fact["accepted"] else "none"), row["layer"]
            assert row["format"]["input_clip"] == fact["accepted"], row["layer"]
    assert all(changed) or (any(changed) and name in MIXTURES)


def test_sizes_are_those_of_the_plan(source: Source, outputs: dict[str, Path]) -> None:
    for name in ("llama", "bert", "phi3"):
        plan, _, _ = prepare(str(source(name)), expand(**request("W4A4", "rtn")))
        report = inspect_checkpoint(outputs[name])
        assert {layer.name: layer.stored_bytes for layer in report.layers} == {
            layer.name: layer.stored_bytes for layer in plan.layers if layer.format
        }
    assert {layer.name: layer.format.input_left for layer in inspect_checkpoint(outputs["llama"]).layers}[
        "model.layers.0.self_attn.o_proj"
    ] == 4  # heads


def test_float_inputs_and_other_methods_around_it(source: Source, tmp_path: Path) -> None:
    """Nothing is rounded on its way: a dense copy computes the same."""
    steps = [{"method": "sinq"}, *request("", "gptq", "norm-tweaking")["recipe"]["steps"]]
    recipe = {"scheme": "W3A16G32", "steps": steps}
    for name in ("opt", "qwen2_moe"):
        out = tmp_path / name
        quantkit.quantize(str(source(name)), output=out, recipe=recipe, calibration=SAMPLES)
        expected = fresh_logits.logits_of("in-process", dense_copy(out, tmp_path / f"dense-{name}"))
        assert relative(fresh_logits.logits_of("quantkit", out), expected) < 1e-4
        assert sum(row["fallback"] is None for row in rows(out)) >= 0.9 * len(rows(out))


def test_gptq_sees_what_is_clipped(source: Source, tmp_path: Path) -> None:
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", **request("W4A4", "gptq"))
    found = fresh_logits.logits_of("quantkit", tmp_path / "out")
    torch.testing.assert_close(simulated_logits(tmp_path / "out", tmp_path / "simulated"), found, rtol=1e-4, atol=1e-4)
    assert all(row["format"]["input_clip"] and row["fallback"] is None for row in rows(tmp_path / "out"))


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", torch.bfloat16, vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "source")
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", **request("W4A4", "rtn"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = {name.rpartition(".")[2]: t for name, t in stored.items() if ".layers.0.mlp.down_proj." in name}
    assert own["input_clip"].dtype == own["input_kronecker_left"].dtype == torch.bfloat16
    assert own["input_clip"].shape == (2,)
    assert fresh_logits.logits_of("quantkit", tmp_path / "out").isfinite().all()


def test_a_stopped_run_goes_on_to_the_same_bytes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resumed(source("opt"), tmp_path, monkeypatch, **request("W4A4", "rtn"))


@pytest.mark.parametrize(
    ("options", "what"), [({}, "multiplies its input by a matrix"), ({"matrices": False}, "cuts off a stored share")]
)
def test_a_portable_checkpoint_is_refused(source: Source, tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot hold this result: .*q_proj {what}"):
        quantkit.quantize(
            str(source("llama")), output=tmp_path / "out", format="compressed-tensors",
            **request("W4A4", "rtn", **options),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_scales_alone_are_portable(source: Source, tmp_path: Path) -> None:
    options = {"matrices": False, "activation_clip": False}
    result = quantkit.quantize(str(source("llama")), output=tmp_path / "out", **request("W8A8", "rtn", **options))
    assert result.format == "compressed-tensors"


def test_a_prime_width_is_scaled_but_not_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    save_tiny("llama", tmp_path / "source", vocab_size=VOCABULARY, intermediate_size=101)
    save_tokenizer(tmp_path / "source")
    result = quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", **request("W4A4", "rtn"))
    plan, _, _ = prepare(str(tmp_path / "source"), expand(**request("W4A4", "rtn")))
    assert plan.output_bytes == result.output_bytes
    found = {row["layer"].rpartition(".")[2]: row["format"] for row in rows(tmp_path / "out")}
    assert found["down_proj"]["input_op"] == "none"
    assert found["down_proj"]["input_clip"]
    assert found["up_proj"]["input_op"] == "kronecker"
    assert "flatquant: mlp.hidden has 101 channels, a prime: they are scaled, not mixed." in caplog.messages
