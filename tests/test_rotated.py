"""Rotated inputs from source folder to reloaded checkpoint: what runs is what was calibrated, planned and recorded.

The residual stream stays as it is here; see ``test_residual.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import dense_copy
from tiny_models import TINY, load_tiny, save_tiny
from torch import Tensor

import quantkit
from quantkit.errors import RecipeError
from quantkit.formats import writer
from quantkit.formats.config import read_config
from quantkit.formats.inspect import inspect_checkpoint
from quantkit.formats.layer import from_tensors
from quantkit.formats.writer import read_record
from quantkit.layers.quant_experts import ExpertNames
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.checkpoint import Checkpoint
from quantkit.pipeline import prepare
from quantkit.presets import expand

FOLDED = (
    "self_attn.o_proj", "self_attn.out_proj", "attention.dense", "attention.output.dense",
)  # fmt: skip
"""Linears that read values, which are rotated within their heads before."""
ONLINE = [{"method": "hadamard", "options": {"residual": "never"}}, "rtn"]
CALIBRATION = {"nsamples": 8, "seqlen": 16, "batch_size": 3}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for event in read_record(folder / "quantkit-run.jsonl") for row in event.get("layers", ())]


def simulated_logits(quantised: Path, folder: Path) -> Tensor:
    """Of plain transformers modules with the decoded weights, whose inputs are changed as config.json says."""
    folder.mkdir()
    config = json.loads((quantised / "config.json").read_text())
    formats = read_config(config.pop("quantization_config"))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(quantised / "model.safetensors")
    layers, inputs = {}, {}
    for row in rows(quantised):
        own = [name for name in tensors if name.rpartition(".")[0] == row["stored"] and not name.endswith(".bias")]
        local = {name.removeprefix(row["stored"] + "."): tensors.pop(name) for name in own}
        layer = layers[row["layer"]] = formats.of(row["layer"])
        weight, inputs[row["layer"]] = from_tensors(local, layer)
        tensors[f"{row['stored']}.weight"] = weight.dequantize()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_tiny(folder, dtype=torch.float32)
    names = ExpertNames("w1", "w3", "w2") if config["model_type"] == "mixtral" else ExpertNames()
    with torch.no_grad():
        simulate_inputs(model, layers, inputs, names)
        logits: Tensor = model(fresh_logits.PROMPT).logits.float()
    return logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TINY)
def test_reloads_as_a_dense_copy_computes(tiny, tmp_path, name):
    """With float inputs a rotation and its inverse are a float weight; with 4 bits the inputs are rotated to be
    rounded."""
    quantkit.quantize(str(tiny(name)), output=tmp_path / "a16", recipe={"scheme": "W4A16G32", "steps": ONLINE})
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "a16", tmp_path / "dense"))
    assert relative(fresh_logits.logits_of("quantkit", tmp_path / "a16"), expected) < 1e-5
    quantkit.quantize(str(tiny(name)), output=tmp_path / "a4", recipe={"scheme": "W4A4", "steps": ONLINE})
    found = fresh_logits.logits_of("quantkit", tmp_path / "a4")
    torch.testing.assert_close(fresh_logits.logits_of("native", tmp_path / "a4"), found, rtol=0, atol=0)
    torch.testing.assert_close(simulated_logits(tmp_path / "a4", tmp_path / "simulated"), found, rtol=1e-4, atol=1e-4)
    assert relative(found, expected) > 0.01
    for row in rows(tmp_path / "a4"):
        assert row["format"]["input_op"] == ("none" if row["layer"].endswith(FOLDED) else "hadamard"), row["layer"]
    # Some of these models' norms have weights near 0: in units of the source, columns behind them err by as much more.
    errors = sorted(row["error"] for row in rows(tmp_path / "a4"))
    assert errors[0] > 0.05
    assert errors[len(errors) // 2] < 0.35


def test_sizes_are_those_of_the_plan(tiny, tmp_path):
    for scheme in ("W4A4", "W3A16G32"):
        recipe = {"scheme": scheme, "steps": ONLINE}
        result = quantkit.quantize(str(tiny("llama")), output=tmp_path / scheme, recipe=recipe)
        plan, _, _ = prepare(str(tiny("llama")), expand(recipe))
        assert plan.format == result.format == "quantkit"
        assert "matrix (hadamard), which only quantkit's format holds" in plan.format_reason
        assert plan.output_bytes == result.output_bytes
        report = inspect_checkpoint(tmp_path / scheme)
        assert {layer.name: layer.stored_bytes for layer in report.layers} == {
            layer.name: layer.stored_bytes for layer in plan.layers
        }
        assert {layer.name: layer.format for layer in report.layers} == {
            layer.name: layer.format for layer in plan.layers
        }


def test_what_a_rotation_costs_is_shown(tiny, tmp_path):
    quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", recipe={"scheme": "W4A4", "steps": ONLINE})
    report = inspect_checkpoint(tmp_path / "out")
    costs = {layer.name.rpartition(".")[2]: layer.online_operations for layer in report.layers}
    assert costs["q_proj"] == 64 * 6 + 2 * 64
    assert costs["down_proj"] == (1 + 2 * 52 + 2) * 104  # a doubling, a base of 52, signs and norm
    assert costs["o_proj"] == 0
    assert report.layers[0].format.describe() == "W4SA4GC hadamard"


def test_same_bytes_again_and_other_bytes_with_another_seed(tiny, tmp_path):
    files = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantkit.quantize(str(tiny("qwen3")), output=tmp_path / out, method="hadamard", scheme="W4A4", seed=seed)
        files[out] = (tmp_path / out / "model.safetensors").read_bytes()
    assert files["a"] == files["b"] != files["c"]


def test_any_rounding_and_other_transforms_before_it(source, tmp_path):
    """GPTQ sees the rotated, rounded inputs; scales of channels come in front of the rotation."""
    for method, scheme in (("hadamard+gptq", "W4A4"), ("smoothquant+hadamard+gptq", "W4A16G32")):
        out = tmp_path / method
        quantkit.quantize(str(source("qwen2_moe")), output=out, method=method, scheme=scheme, calibration=CALIBRATION)
        assert sum(row["fallback"] is None for row in rows(out)) >= 0.9 * len(rows(out))
    expected = fresh_logits.logits_of("in-process", dense_copy(out, tmp_path / "dense"))
    assert relative(fresh_logits.logits_of("quantkit", out), expected) < 1e-5
    found = fresh_logits.logits_of("quantkit", tmp_path / "hadamard+gptq")
    expected = simulated_logits(tmp_path / "hadamard+gptq", tmp_path / "simulated")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_online_scales_and_a_rotation_of_one_input(tiny, tmp_path):
    steps = [{"method": "sinq", "options": {"absorb": "never"}}, "hadamard", "rtn"]
    quantkit.quantize(str(tiny("opt")), output=tmp_path / "out", recipe={"scheme": "W3A16G32", "steps": steps})
    layer = rows(tmp_path / "out")[0]["format"]
    assert (layer["input_scale"], layer["input_op"]) == (True, "hadamard")
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "out", tmp_path / "dense"))
    assert relative(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected) < 1e-5
    assert all(0.05 < row["error"] < 0.5 for row in rows(tmp_path / "out"))


def test_a_stopped_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    """Block 1 is calibrated on what the restored block 0 makes of the samples, its rotations included."""
    request = {"method": "hadamard+gptq", "scheme": "W4A4", "calibration": CALIBRATION}
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
    quantkit.quantize(str(source("qwen2_moe")), output=tmp_path / "stopped", resume=True, **request)
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_bfloat16_model_stays_one(tmp_path):
    save_tiny("llama", tmp_path / "source", torch.bfloat16)
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", method="hadamard", scheme="W4A4")
    names = Checkpoint.open(tmp_path / "out").names
    assert names["model.layers.0.mlp.down_proj.input_hadamard_signs"].dtype == torch.int8
    found = fresh_logits.logits_of("quantkit", tmp_path / "out")
    assert found.isfinite().all()
    model, _ = quantkit.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("later", ["sinq", "smoothquant", "awq"])
def test_nothing_is_scaled_behind_a_rotation(tiny, tmp_path, later):
    with pytest.raises(RecipeError, match=f"'{later}' comes after 'hadamard'.*so put 'hadamard' last"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", method=f"hadamard+{later}", scheme="W4A16G32")
    assert not (tmp_path / "out").exists()


def test_rotations_within_heads_alone_are_portable_and_may_come_first(tiny, tmp_path):
    """They are folded: nothing is left to do at run time."""
    steps = [{"method": "hadamard", "options": {"sites": ["attention.value"]}}, "sinq", "rtn"]
    result = quantkit.quantize(
        str(tiny("qwen3")), output=tmp_path / "out", recipe={"scheme": "W4A16GC", "steps": steps}
    )
    assert result.format == "compressed-tensors"
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "out", tmp_path / "dense"))
    assert relative(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected) < 1e-5


def test_a_portable_checkpoint_is_refused(tiny, tmp_path):
    recipe = {"scheme": "W4A4", "steps": ONLINE, "format": "compressed-tensors"}
    with pytest.raises(RecipeError, match=r"cannot hold this result: .*q_proj multiplies its input by a matrix"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", recipe=recipe)


def test_a_size_without_a_hadamard_matrix(tmp_path):
    save_tiny("llama", tmp_path / "source", intermediate_size=92)
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", method="hadamard", scheme="W4A16G32")
    events = read_record(tmp_path / "out" / "quantkit-run.jsonl")
    facts = [fact for event in events for fact in event.get("transforms", ())]
    assert {fact["matrix"] for fact in facts if fact["width"] == 92} == {"hartley"}
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "out", tmp_path / "dense"))
    assert relative(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected) < 1e-5
