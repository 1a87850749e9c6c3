"""Methods that look at data, from source folder to reloaded checkpoint, on every architecture."""

import json
import shutil
from pathlib import Path

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import dense_copy
from tiny_models import TINY

import quantkit
from quantkit.calibrate.text import load_text
from quantkit.errors import QuantkitError
from quantkit.eval.perplexity import perplexity
from quantkit.formats import writer
from quantkit.formats.writer import read_record

CALIBRATION = {"nsamples": 12, "seqlen": 24, "batch_size": 5}


def rows(folder: Path) -> list[dict]:
    return [row for event in read_record(folder / "quantkit-run.jsonl") for row in event.get("layers", ())]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("method", ["gptq", "sinq+gptq"])
def test_gptq_reloads_and_records_what_it_did(source, tmp_path, name, method):
    quantkit.quantize(
        str(source(name)), output=tmp_path / "out", method=method, scheme="W3A16G32", calibration=CALIBRATION
    )
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "out", tmp_path / "dense"))
    found = fresh_logits.logits_of("quantkit", tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    recorded = rows(tmp_path / "out")
    rounded = [row for row in recorded if row["fallback"] is None]
    assert len(rounded) >= 0.9 * len(recorded)  # an expert that no token chose has nothing to go by
    assert all(row["loss"] > 0 and 0.01 <= row["damping"] <= 1 for row in rounded)


@pytest.mark.slow
def test_gptq_loses_less_than_rtn_on_a_trained_model(tmp_path):
    """Held-out text, 2 bits: what GPTQ loses in weights it wins in outputs, and more."""
    text = load_text("demo")
    perplexities = {}
    for method in ("rtn", "gptq"):
        samples = {"nsamples": 48, "seqlen": 256}
        quantkit.quantize("demo", output=tmp_path / method, method=method, scheme="W2A16G64", calibration=samples)
        model, tokenizer = quantkit.load(tmp_path / method, dtype="float32")
        perplexities[method] = perplexity(model, tokenizer, text, seqlen=256, max_tokens=4096, batch_size=8).value
    assert perplexities["gptq"] < 0.97 * perplexities["rtn"]


def test_quantised_activations_are_what_gptq_sees(source, tmp_path):
    out = tmp_path / "out"
    quantkit.quantize(str(source("llama")), output=out, method="gptq", scheme="W4A8", calibration=CALIBRATION)
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"
    assert block["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8
    assert all(row["fallback"] is None for row in rows(out))


ASYMMETRIC = {"scheme": "W3A16G32", "steps": [{"method": "gptq", "options": {"retarget": 0.5}}]}


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "sinq+gptq", "scheme": "W3A16G32"},
        {"method": "sinq+gptq", "scheme": "W4A8"},
        {"method": "smoothquant", "scheme": "W8A8TS"},
        {"recipe": ASYMMETRIC},
        {"recipe": ASYMMETRIC | {"scheme": "W4A8"}},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, request_):
    request = request_ | {"calibration": CALIBRATION}
    quantkit.quantize(str(source("qwen2_moe")), output=tmp_path / "whole", **request)

    def stop_at_the_second_block(self, key, *rest):
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(source("qwen2_moe")), output=tmp_path / "stopped", **request)
    monkeypatch.undo()
    assert not (tmp_path / "stopped").exists()
    quantkit.quantize(str(source("qwen2_moe")), output=tmp_path / "stopped", resume=True, **request)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_asymmetric_calibration_compares_with_the_float_model(source, tmp_path):
    """The weights of the second block are moved by what the first block's rounding did; those of the first are not."""
    codes = {}
    for retarget in (0.0, 0.5):
        steps = [{"method": "gptq", "options": {"retarget": retarget}}]
        out = tmp_path / str(retarget)
        recipe = ASYMMETRIC | {"steps": steps}
        quantkit.quantize(str(source("llama")), output=out, recipe=recipe, calibration=CALIBRATION)
        codes[retarget] = load_file(out / "model.safetensors")
    moved = {name for name in codes[0.0] if not torch.equal(codes[0.0][name], codes[0.5][name])}
    assert "model.layers.1.self_attn.q_proj.weight_packed" in moved
    assert all(name.startswith("model.layers.1.") for name in moved)


def test_hqq_needs_no_data_and_beats_rtn_in_weight_error(tiny, tmp_path):
    for method in ("rtn", "hqq"):
        quantkit.quantize(str(tiny("qwen3")), output=tmp_path / method, method=method, scheme="W2A16G32")
    error = {method: sum(row["error"] for row in rows(tmp_path / method)) for method in ("rtn", "hqq")}
    assert error["hqq"] < 0.95 * error["rtn"]


def test_calibration_that_cannot_work(source, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(QuantkitError, match=r"'short' has \d+ tokens, but 12 samples of 24 take 288"):
        quantkit.quantize(
            str(source("llama")), output=tmp_path / "out", method="gptq", scheme="W4A16G32",
            calibration=CALIBRATION | {"source": str(tmp_path / "short.txt")},
        )  # fmt: skip
    with pytest.raises(QuantkitError, match="no tokenizer"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", method="gptq", scheme="W4A16G32")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_samples_longer_than_the_model_are_shortened_and_said(source, tmp_path):
    longer = shutil.copytree(source("llama"), tmp_path / "source")
    out = tmp_path / "out"
    quantkit.quantize(
        str(longer), output=out, method="gptq", scheme="W4A16G32", calibration={"nsamples": 4, "seqlen": 1000}
    )
    start = read_record(out / "quantkit-run.jsonl")[0]
    assert start["calibration"]["seqlen"] == 128
    assert any("128 tokens instead of 1000" in note for note in start["notes"])
