"""Schemes with KV, from source folder to reloaded checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import dense_copy, fresh
from tiny_models import CAUSAL, load_tiny
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats import writer
from quantkit.formats.config import read_kv
from quantkit.formats.writer import read_record
from quantkit.kv.cache import QuantisedLayer

CALIBRATION = {"nsamples": 8, "seqlen": 24, "batch_size": 4}


def block_of(folder: Path) -> dict[str, Any]:
    block: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return block


class EightBits(DynamicCache):
    """Rounds what it is given, by a formula of its own: 8 bits, with a zero point, per token and head."""

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        rounded = []
        for states in (keys, values):
            low = torch.minimum(states.min(-1, keepdim=True).values, torch.zeros(()))
            high = torch.maximum(states.max(-1, keepdim=True).values, torch.zeros(()))
            step = ((high - low) / 255).half().float()
            zero = torch.round(-low / step)
            rounded.append(step * (torch.clip(torch.round(states / step) + zero, 0, 255) - zero))
        return super().update(*rounded, *rest, **more)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_holds_what_the_scheme_says(source, tmp_path, name):
    """Against a plain float model of the decoded weights with a cache that does the rounding."""
    out = tmp_path / "out"
    quantkit.quantize(str(source(name)), output=out, method="rtn", scheme="W4A16KV8G32")
    assert block_of(out)["kv_cache"] == {
        "bits": 8, "symmetric": False, "clip": 1.0, "key_transform": "none", "seed": 0, "learned_clips": False
    }  # fmt: skip
    dense = load_tiny(dense_copy(out, tmp_path / "dense"))
    model, _ = quantkit.load(out)
    ids = fresh_logits.PROMPT
    with torch.no_grad():
        expected = dense(ids, past_key_values=EightBits(config=dense.config)).logits
        unrounded = dense(ids).logits
        for settings in ({"use_cache": False}, {}, {"past_key_values": quantkit.kv_cache(model)}):
            found = model(ids, **settings).logits
            difference = (found - expected).abs().mean()  # a code on the edge may fall to either side
            assert difference < 0.05 * (expected - unrounded).abs().mean()


RUNS = [
    ("llama", "rtn", "W4A4KV4"),
    ("gemma2", "gptq", "W4A4KV4"),
    ("bloom", "rtn", "W8A8KV8"),
    ("qwen2_moe", "gptq", "W8A8KV8"),
    ("phi3", "sinq", "W4A16KV2G32"),
]


@pytest.fixture(scope="module")
def quantised(source, tmp_path_factory) -> list[Path]:
    """A folder for each of ``RUNS``."""
    root = tmp_path_factory.mktemp("quantised")
    for name, method, scheme in RUNS:
        quantkit.quantize(str(source(name)), output=root / name, method=method, scheme=scheme, calibration=CALIBRATION)
    return [root / name for name, _, _ in RUNS]


def test_a_fresh_process_gives_the_logits_of_this_one(quantised, tmp_path):
    """There by plain transformers after ``import quantkit``, here by ``quantkit.load``."""
    found = fresh("native", quantised, tmp_path / "logits")
    for folder in quantised:
        model, _ = quantkit.load(folder)
        assert all(isinstance(layer, QuantisedLayer) for layer in model(fresh_logits.PROMPT).past_key_values.layers)
        with torch.inference_mode():
            assert torch.equal(found[folder.name], model(fresh_logits.PROMPT).logits)
        end = read_record(folder / "quantkit-run.jsonl")[-1]
        assert end["probe_difference"] < 1e-3


@pytest.mark.parametrize("method", ["hadamard+rtn", "awq+gptq+norm-tweaking"])
def test_other_methods_go_with_it(source, tmp_path, method):
    """The check of the reloaded checkpoint would tell; a tuning takes gradients through the rounding."""
    out = tmp_path / "out"
    quantkit.quantize(str(source("qwen3")), output=out, method=method, scheme="W4A4KV4", calibration=CALIBRATION)
    model, _ = quantkit.load(out)
    ids = fresh_logits.PROMPT
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-3)
    tuned = [event["tuning"] for event in read_record(out / "quantkit-run.jsonl") if event.get("tuning")]
    assert [facts["skipped_steps"] for facts in tuned] == [0] * (2 if "norm-tweaking" in method else 0)


def test_gptq_sees_rounded_keys_and_values(source, tmp_path):
    """Only what comes behind attention can: o_proj of the first block, and everything after it."""
    tensors = {}
    for scheme in ("W4A16G32", "W4A16KV3G32"):
        out = tmp_path / scheme
        quantkit.quantize(
            str(source("llama")), output=out, method="gptq", scheme=scheme, format="quantkit", calibration=CALIBRATION
        )
        tensors[scheme] = load_file(out / "model.safetensors")
    float_kv, rounded = tensors.values()
    moved = {
        name.removeprefix("model.layers.").removesuffix(".weight_packed")
        for name in float_kv
        if name.endswith("weight_packed") and not torch.equal(float_kv[name], rounded[name])
    }
    assert "0.self_attn.o_proj" in moved
    assert "1.self_attn.q_proj" in moved
    assert not moved & {"0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"}


@pytest.mark.parametrize(("method", "scheme"), [("gptq", "W3A16KV3G32"), ("smoothquant+gptq", "W8A8TSKV4")])
def test_a_stopped_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, method, scheme):
    request = {"method": method, "scheme": scheme, "calibration": CALIBRATION}
    quantkit.quantize(str(source("llama")), output=tmp_path / "whole", **request)

    def stop_at_the_second_block(self, key, *rest):
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(source("llama")), output=tmp_path / "stopped", **request)
    monkeypatch.undo()
    quantkit.quantize(str(source("llama")), output=tmp_path / "stopped", resume=True, **request)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert block_of(tmp_path / "whole") == block_of(tmp_path / "stopped")


def test_a_recipe_may_set_everything(source, tmp_path):
    kv = {"bits": 5, "symmetric": True, "clip": 0.9, "key_transform": "hadamard"}
    recipe = {"scheme": {"weights": {"bits": 4, "group_size": 32}, "kv": kv}, "steps": ["rtn"], "seed": 3}
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe)
    block = block_of(tmp_path / "out")
    assert block["kv_cache"] == kv | {"seed": 3, "learned_clips": False}
    kept = read_kv(block)
    assert kept is not None
    assert kept.describe() == "5-bit codes, a step per token and head, 0.9 of the range; keys rotated (hadamard)"
    model, _ = quantkit.load(tmp_path / "out")
    assert model.config.quantization_config.to_dict()["kv_cache"] == block["kv_cache"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_keys_are_rotated_up_to_4_bits(source, bits, tmp_path):
    run = CliRunner().invoke(app, ["quantize", str(source("llama")), "--scheme", f"W4KV{bits}", "--dry-run", "--json"])
    plan = json.loads(run.stdout)
    assert plan["kv_cache"]["key_transform"] == ("hadamard" if bits <= 4 else "none")
    assert any(note.startswith(f"keys and values are kept as {bits}-bit codes") for note in plan["notes"])
    assert plan["format"] == "quantkit"
    assert "keys and values" in plan["format_reason"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"scheme": "W4A16KV4"}, "BertForMaskedLM does not predict the next token, so it has no cache; leave"),
        ("llama", {"scheme": "W16A16KV4"}, "leaves the weights as they are"),
        ("llama", {"scheme": "W4A16KV4", "format": "compressed-tensors"}, "no field for keys and values of 4 bits"),
        ("llama", {"scheme": "W4A16KV9"}, "kv.bits"),
    ],
)  # fmt: skip
def test_what_cannot_be(source, tmp_path, name, settings, message):
    with pytest.raises(RecipeError, match=message):
        quantkit.quantize(str(source(name)), output=tmp_path / "out", method="rtn", **settings)
    assert not (tmp_path / "out").exists()


def test_damaged_config_is_reported():
    with pytest.raises(QuantkitError, match=r"quantization_config\.kv_cache\.bits: .*damaged"):
        read_kv({"quant_method": "quantkit", "kv_cache": {"bits": 99}})


def test_commands(source, tmp_path):
    out = tmp_path / "out"

    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr
        return done

    run("quantize", source("llama"), "--method", "rtn", "--scheme", "W4A4KV4", "-o", out)
    assert "keys and values in the cache: 4-bit codes, a step and a zero point" in run("inspect", out).stdout
    assert json.loads(run("inspect", out, "--json").stdout)["kv_cache"]["bits"] == 4
    said = json.loads(run("generate", out, "The quick brown", "--max-new-tokens", "8", "--json").stdout)
    assert said["tokens"] == 8
    assert 0 < said["kv_cache"]["bits_per_element"] < 32
    assert "bits per element" in run("generate", out, "The quick brown", "--max-new-tokens", "8").stderr
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    report = json.loads(run("eval", out, "--ppl", tmp_path / "text.txt", "--seqlen", "32", "--json").stdout)
    assert math.isfinite(report["perplexity"]["text"]["value"])
