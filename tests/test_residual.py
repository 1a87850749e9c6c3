"""A rotated residual stream from source folder to reloaded checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import dense_copy, fresh
from test_rotated import CALIBRATION, relative, rows, simulated_logits
from tiny_models import TINY, load_tiny, save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats import writer
from quantkit.formats.inspect import inspect_checkpoint
from quantkit.formats.summary import summarise
from quantkit.models.checkpoint import Checkpoint
from quantkit.pipeline import prepare
from quantkit.presets import expand

REFUSED = ("gemma2", "gemma3", "bloom", "bert", "bert_classifier")
ALLOWED = tuple(name for name in TINY if name not in REFUSED)
HIDDEN = ("down_proj", "fc2", "dense_4h_to_h", "w2")
TIED = ("qwen2", "qwen3")


def request(scheme: str, *others: str, **options: Any) -> dict[str, Any]:
    """A recipe: hadamard with ``options`` before ``others``, by default rtn."""
    steps = [{"method": "hadamard", "options": {"residual": "always"} | options}, *(others or ("rtn",))]
    return {"scheme": scheme, "steps": steps}


def typical(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the median token: now and then a token of a mixture changes its expert."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory) -> dict[str, Path]:
    """'arch-scheme' -> quantised folder."""
    root = tmp_path_factory.mktemp("quantised")
    folders = {}
    for name in ALLOWED:
        for scheme in ("W4A16G32", "W4A4"):
            folders[f"{name}-{scheme}"] = root / f"{name}-{scheme}"
            quantkit.quantize(str(tiny(name)), output=root / f"{name}-{scheme}", recipe=request(scheme))
    return folders


@pytest.fixture(scope="module")
def reloaded(outputs, tmp_path_factory) -> dict[str, torch.Tensor]:
    """'arch-scheme' -> logits of a process that has seen nothing else."""
    return fresh("quantkit", list(outputs.values()), tmp_path_factory.mktemp("logits") / "quantkit")


@pytest.mark.parametrize("name", ALLOWED)
def test_reloads_as_a_dense_copy_computes(outputs, reloaded, tmp_path, name):
    a16, a4 = outputs[f"{name}-W4A16G32"], outputs[f"{name}-W4A4"]
    expected = fresh_logits.logits_of("in-process", dense_copy(a16, tmp_path / "dense"))
    assert relative(reloaded[a16.name], expected) < 1e-5
    torch.testing.assert_close(fresh_logits.logits_of("native", a4), reloaded[a4.name], rtol=0, atol=0)
    simulated = simulated_logits(a4, tmp_path / "simulated")
    torch.testing.assert_close(simulated, reloaded[a4.name], rtol=1e-4, atol=1e-4)
    for row in rows(a4):  # only what is not between a norm and the stream, nor a value
        hidden = row["layer"].endswith(HIDDEN)
        assert row["format"]["input_op"] == ("hadamard" if hidden else "none"), row["layer"]
        assert 0.05 < row["error"] < 0.35


@pytest.mark.parametrize("name", ALLOWED)
def test_the_function_is_that_of_the_source(tiny, tmp_path, name):
    """Eight bits are close to none: anything that is not rotated, inside or outside the blocks, is far off."""
    quantkit.quantize(str(tiny(name)), output=tmp_path / "out", recipe=request("W8A16G32"))
    expected = fresh_logits.logits_of("in-process", tiny(name))
    assert typical(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected) < 0.02
    assert config_of(tmp_path / "out").get("tie_word_embeddings", True) == (name == "opt")


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_before_anything_is_written(tiny, tmp_path, name):
    with pytest.raises(
        RecipeError, match=r"residual: always: the residual stream cannot be rotated: .*(Gemma|Bl|Bert)"
    ):
        quantkit.quantize(str(tiny(name)), output=tmp_path / "out", recipe=request("W4A16G32"))
    assert not list(tmp_path.iterdir())
    plan, _, _ = prepare(str(tiny(name)), expand(method="hadamard", scheme="W4A16G32"))
    assert not plan.residual
    assert {layer.format.input_op for layer in plan.layers if layer.format} == {"hadamard", "none"}


def test_it_comes_first(tiny, tmp_path):
    steps = ["sinq", *request("W4A16G32")["steps"]]
    with pytest.raises(RecipeError, match=r"'hadamard' with residual: always comes after 'sinq'.*put it first"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", recipe={"scheme": "W4A16G32", "steps": steps})
    with pytest.raises(RecipeError, match=r"steps.0 \(hadamard\): residual is 'sometimes'"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", recipe=request("W4A4", residual="sometimes"))


def test_auto(tiny):
    """Where nothing is lost by it: not where it would untie embeddings or where not all of its places are asked for."""

    def plan(name: str, recipe: Any = None, **request: Any):
        return prepare(str(tiny(name)), expand(recipe, scheme="W4A4", **request))[0]

    for name in TINY:
        assert bool(plan(name, method="hadamard").residual) == (name in ALLOWED and name not in TIED), name
    assert not plan("llama", method="smoothquant+hadamard").residual
    assert not plan("llama", method="rtn").residual
    for sites in (["mlp.hidden"], ["attention.input", "mlp.hidden"], ["attention.value"]):
        steps = [{"method": "hadamard", "options": {"sites": sites}}, "rtn"]
        assert not plan("llama", {"steps": steps}).residual
    steps = [{"method": "hadamard", "options": {"sites": ["attention.input", "mlp.input"]}}, "rtn"]
    everywhere = plan("llama", {"steps": steps})
    assert everywhere.residual
    assert {layer.format.input_op for layer in everywhere.layers} == {"none"}


def test_is_said(tiny, tmp_path):
    plan, _, _ = prepare(str(tiny("qwen2")), expand(request("W4A4")))
    text = "rotated (Hadamard, 64 channels), embeddings untied"
    assert plan.residual == plan.describe()["residual"] == text
    assert f"the residual stream is {text}" in plan.notes
    result = quantkit.quantize(str(tiny("qwen2")), output=tmp_path / "out", recipe=request("W4A4"))
    assert plan.output_bytes == result.output_bytes
    assert plan.source_bytes == result.source_bytes == Checkpoint.open(tiny("qwen2")).nbytes
    report = inspect_checkpoint(tmp_path / "out")
    assert report.record[0]["residual"] == text
    assert f"residual stream: {text}" in summarise(report.record)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "out").names
    assert (
        prepare(str(tiny("opt")), expand(request("W4A4")))[0].residual == "rotated (Hadamard, 64 channels, mean kept)"
    )


def test_portable_where_nothing_is_left_to_run(tiny, tmp_path):
    """Plain transformers, which has never heard of rotations."""
    pytest.importorskip("compressed_tensors")
    recipe = request("W4A16GC", sites=["attention.value"]) | {"format": "compressed-tensors"}
    outputs = [tmp_path / name for name in ("qwen2", "gpt_neox", "mixtral")]
    for output in outputs:
        result = quantkit.quantize(str(tiny(output.name)), output=output, recipe=recipe)
        assert result.format == "compressed-tensors"
    found = fresh("transformers", outputs, tmp_path / "plain.safetensors")
    for output in outputs:
        here = fresh_logits.logits_of("quantkit", output)
        torch.testing.assert_close(found[output.name], here, rtol=1e-5, atol=1e-5)
        expected = fresh_logits.logits_of("in-process", dense_copy(output, tmp_path / f"{output.name}-dense"))
        assert relative(found[output.name], expected) < 1e-5


def test_other_steps_see_the_rotated_model(tmp_path):
    """Scales behind it, calibrated rounding, tuning against the float model: all in one basis."""
    save_tiny("qwen2_moe", tmp_path / "source", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "source")
    recipe = request("W8A16G32", "smoothquant", "gptq", "norm-tweaking", sites=["attention.value"])
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", recipe=recipe | {"calibration": CALIBRATION})
    expected = fresh_logits.logits_of("in-process", tmp_path / "source")
    assert typical(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected) < 0.02


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    save_tiny("qwen3", tmp_path / "source", torch.bfloat16, vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "source")
    recipe = request("W4A4", "gptq") | {"calibration": CALIBRATION}
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "whole", recipe=recipe)

    def stop_at_the_second_block(self, key, *rest):
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "stopped", recipe=recipe)
    monkeypatch.undo()
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "stopped", resume=True, recipe=recipe)
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()
    names = Checkpoint.open(tmp_path / "whole").names
    assert {names[name].dtype for name in ("lm_head.weight", "model.norm.weight")} == {torch.bfloat16}
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "other", recipe=recipe | {"seed": 1})
    assert whole.read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["qwen3", "opt", "gpt_neox", "qwen2_moe"])
def test_learned_rotations_leave_the_function(source, tmp_path, name):
    recipe = request("W8A8", learn_steps=12) | {"calibration": CALIBRATION}
    quantkit.quantize(str(source(name)), output=tmp_path / "out", recipe=recipe)
    expected = fresh_logits.logits_of("in-process", source(name))
    assert typical(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected) < 0.05
    assert not list((tmp_path / "out").glob("*.tmp"))
    report = inspect_checkpoint(tmp_path / "out")
    (event,) = (event for event in report.record if event["event"] == "rotation")
    assert event["loss"] < event["loss_before"] < 1e-3
    assert any(
        line.startswith("residual stream: learned, error of rounded inputs") for line in summarise(report.record)
    )
    facts = [
        fact for event in report.record for fact in event.get("transforms", ()) if fact["site"] == "attention.value"
    ]
    assert len(facts) == 2
    assert all(fact["loss"] <= fact["loss_before"] for fact in facts)


def test_a_learned_rotation_is_learned_once(source, tmp_path, monkeypatch):
    """A run that goes on takes up the rotation that its first blocks were written in."""
    recipe = request("W4A4", learn_steps=8) | {"calibration": CALIBRATION}
    source = str(source("gpt_neox"))
    quantkit.quantize(source, output=tmp_path / "whole", recipe=recipe)

    def stop_at_the_second_block(self, key, *rest):
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(source, output=tmp_path / "stopped", recipe=recipe)
    monkeypatch.undo()
    monkeypatch.setattr("quantkit.calibrate.rotation.learn_residual", pytest.fail)
    quantkit.quantize(source, output=tmp_path / "stopped", resume=True, recipe=recipe)
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize(("scheme", "residual"), [("W4A16G32", "always"), ("W4A4", "auto"), ("W4A4", "never")])
def test_what_a_rotation_cannot_be_learned_for(tiny, tmp_path, scheme, residual):
    with pytest.raises(
        RecipeError, match=r"learn_steps: 5 with scheme .*give residual: always and a scheme such as W4A4"
    ):
        quantkit.quantize(
            str(tiny("llama")), output=tmp_path / "out", recipe=request(scheme, residual=residual, learn_steps=5)
        )


def test_a_merged_mixture_gives_the_same(tiny, tmp_path):
    model = load_tiny(tiny("qwen3_moe"))
    (tmp_path / "merged").mkdir()
    shutil.copy(tiny("qwen3_moe") / "config.json", tmp_path / "merged")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    for name, source in (("a", tiny("qwen3_moe")), ("b", tmp_path / "merged")):
        quantkit.quantize(str(source), output=tmp_path / name, recipe=request("W4A16G32"))
    found = fresh_logits.logits_of("quantkit", tmp_path / "b")
    torch.testing.assert_close(found, fresh_logits.logits_of("quantkit", tmp_path / "a"), rtol=1e-4, atol=1e-4)


def test_damage_is_found_where_it_is(tiny, tmp_path):
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantkitError, match=r"tensor model.layers.1.post_attention_layernorm.weight in .* holds NaN"):
        quantkit.quantize(str(source), output=tmp_path / "out", recipe=request("W4A4"))


def test_an_outlier_channel_of_the_stream(tmp_path):
    """One channel of every embedding is large: four bits for each token lose the others, and nothing much behind R."""
    save_tiny("llama", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 7] += 60
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    expected = fresh_logits.logits_of("in-process", tmp_path / "source")
    errors = {}
    for name, steps in (("plain", ["rtn"]), ("rotated", request("")["steps"])):
        recipe = {"scheme": "W8A4", "steps": steps}
        quantkit.quantize(str(tmp_path / "source"), output=tmp_path / name, recipe=recipe)
        errors[name] = relative(fresh_logits.logits_of("quantkit", tmp_path / name), expected)
    assert errors["rotated"] < 0.5 * errors["plain"]


def test_from_the_command_line(tiny, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(request("W4A4")))
    recipe, out = str(tmp_path / "recipe.json"), str(tmp_path / "out")
    told = "rotated (Hadamard, 64 channels, mean kept)"
    for command in (
        ["quantize", str(tiny("gpt_neox")), "--recipe", recipe, "--dry-run"],
        ["quantize", str(tiny("gpt_neox")), "--recipe", recipe, "-o", out],
        ["inspect", out],
    ):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        assert ("residual stream is " if "--dry-run" in command else "residual stream: ") + told in done.stdout
