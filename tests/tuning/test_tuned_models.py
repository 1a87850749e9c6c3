"""Norm tweaking from source folder to reloaded checkpoint, on every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import dense_copy
from tiny_models import TINY, load_tiny

import quantkit
from quantkit.formats import writer
from quantkit.formats.writer import read_record
from quantkit.tuning import norm_tweaking

CALIBRATION = {"nsamples": 12, "seqlen": 24, "batch_size": 5}


def quantise(source: Path, output: Path, rounding: str, scheme: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint."""
    options = settings.pop("options", {})
    steps = [rounding] if options is None else [rounding, {"method": "norm-tweaking", "options": options}]
    recipe = {"scheme": scheme, "steps": steps, "calibration": CALIBRATION}
    quantkit.quantize(str(source), output=output, recipe=recipe, **settings)
    return load_file(output / "model.safetensors")


def tunings(folder: Path) -> list[dict[str, Any]]:
    return [event["tuning"] for event in read_record(folder / "quantkit-run.jsonl") if event.get("tuning")]


def check_reloads(folder: Path, dense: Path) -> None:
    expected = fresh_logits.logits_of("in-process", dense_copy(folder, dense))
    found = fresh_logits.logits_of("quantkit", folder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_reloads_and_records_what_it_did(source, tmp_path, name, rounding):
    tensors = quantise(source(name), tmp_path / "out", rounding, "W3A16G32", options={"tries": 6})
    check_reloads(tmp_path / "out", tmp_path / "dense")
    facts = tunings(tmp_path / "out")
    assert len(facts) == 2
    assert any(fact["accepted"] for fact in facts)
    for fact in facts:
        assert fact["method"] == "norm-tweaking"
        for measure in ("distance", "mse"):
            assert 0 < fact["after"]["heldout"][measure] <= fact["before"]["heldout"][measure]
    if rounding == "rtn":  # GPTQ sees in the second block what tuning made of the first
        plain = quantise(source(name), tmp_path / "plain", rounding, "W3A16G32", options=None)
        changed = {key for key, tensor in plain.items() if not torch.equal(tensors[key], tensor)}
        assert changed
        assert all("norm" in key or "LayerNorm" in key or "layernorm" in key for key in changed)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_activations_that_are_rounded(source, tmp_path, name):
    out = tmp_path / "out"
    quantise(source(name), out, "rtn", "W4A8", options={"tries": 8})
    assert any(fact["accepted"] and fact["changed"] > 0.5 for fact in tunings(out))
    if name == "llama":
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] != "quantkit"
    model, _ = quantkit.load(out, dtype="float32")
    assert torch.isfinite(model(input_ids=torch.arange(3, 30)[None]).logits).all()


def test_transforms_and_online_scales_come_before(source, tmp_path):
    steps = [
        {"method": "sinq", "options": {"absorb": "never"}}, "rtn", {"method": "norm-tweaking", "options": {"tries": 6}},
    ]  # fmt: skip
    recipe = {"scheme": "W3A16G32", "steps": steps, "calibration": CALIBRATION}
    quantkit.quantize(str(source("gemma2")), output=tmp_path / "out", recipe=recipe)
    check_reloads(tmp_path / "out", tmp_path / "dense")
    assert all(fact["accepted"] for fact in tunings(tmp_path / "out"))


def test_the_next_block_is_tuned_on_what_the_stored_one_makes(source, tmp_path, monkeypatch):
    """And what float32 tuning gave is what the stored dtype can hold."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    returned: dict[str, torch.Tensor] = {}
    tune = norm_tweaking.tune

    def spy(situation: Any, config: Any) -> Any:
        streams = situation.streams
        seen.append((streams.hidden("quantised", 0), streams._ids[: len(streams.samples(0))]))
        tuned = tune(situation, config)
        returned.update({f"model.layers.{situation.index}.{name}": tensor for name, tensor in tuned.tensors.items()})
        return tuned

    monkeypatch.setattr(norm_tweaking, "tune", spy)
    tensors = quantise(source("llama", torch.bfloat16), tmp_path / "out", "gptq", "W2A16G32", options={"tries": 8})
    assert "model.layers.0.input_layernorm.weight" in returned
    for name, tensor in returned.items():
        assert torch.equal(tensors[name].float(), tensor)
    model = load_tiny(dense_copy(tmp_path / "out", tmp_path / "dense"), dtype=torch.float32).eval()
    hidden, ids = seen[1]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(hidden, states[1], rtol=1e-4, atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    request = {"options": {"tries": 6}}
    whole = quantise(source("qwen2_moe"), tmp_path / "whole", "gptq", "W3A16G32", **request)

    def stop_at_the_second_block(self: Any, key: str, *rest: Any) -> None:
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantise(source("qwen2_moe"), tmp_path / "stopped", "gptq", "W3A16G32", **request)
    monkeypatch.undo()
    resumed = quantise(source("qwen2_moe"), tmp_path / "stopped", "gptq", "W3A16G32", resume=True, **request)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "stopped/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_a_trained_model_loses_less(tmp_path, rounding):
    """Perplexity of held-out text at 2 bits."""
    from quantkit.calibrate.text import load_text
    from quantkit.eval.perplexity import perplexity

    text, found = load_text("demo"), []
    for method in (rounding, f"{rounding}+norm-tweaking"):
        samples = {"nsamples": 32, "seqlen": 128}
        quantkit.quantize("demo", output=tmp_path / method, method=method, scheme="W2A16G64", calibration=samples)
        model, tokenizer = quantkit.load(tmp_path / method, dtype="float32")
        found.append(perplexity(model, tokenizer, text, seqlen=256, max_tokens=4096, batch_size=8).value)
    assert found[1] < found[0]
