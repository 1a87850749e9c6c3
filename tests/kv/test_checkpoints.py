"""A recipe that names a cache, from source folder to reloaded checkpoint; and other caches for quantised models."""

from __future__ import annotations

import json
from typing import Any

import fresh_logits
import pytest
import torch
from tiny_models import load_tiny
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.errors import RecipeError
from quantkit.formats.config import read_kv
from quantkit.kv import attention_function
from quantkit.kv.attach import kv_format, set_kv
from quantkit.kv.cache import QuantisedLayer

CALIBRATION = {"nsamples": 4, "seqlen": 24, "batch_size": 4}
KIVI = {"method": "kivi", "bits": 2, "group_size": 8, "residual": 8}
ROTATION = {"method": "rotation", "bits": 2, "gain": "unbiased", "seed": 0}
IDS = fresh_logits.PROMPT.repeat(1, 3)


def recipe_of(kv: Any, step: str = "rtn", **more: Any) -> dict[str, Any]:
    return {"scheme": "W4A16G32", "steps": [step], "kv": kv, "calibration": CALIBRATION} | more


@pytest.mark.parametrize(
    ("name", "kv", "step"), [("llama", KIVI, "rtn"), ("gemma3", KIVI, "gptq"), ("qwen3", ROTATION, "gptq")]
)
def test_the_checkpoint_carries_the_cache_and_loading_uses_it(source, tmp_path, name, kv, step):
    out = tmp_path / "out"
    quantkit.quantize(str(source(name)), output=out, recipe=recipe_of(kv, step))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["kv_cache"] == kv
    ours, _ = quantkit.load(out)
    theirs = load_tiny(out)  # plain transformers, after the import of quantkit
    with torch.inference_mode():
        logits = ours(IDS).logits
        assert torch.equal(theirs(IDS).logits, logits)
        assert torch.equal(ours(IDS, use_cache=False).logits, logits)
        cache = quantkit.kv_cache(ours)
        assert torch.equal(ours(IDS, past_key_values=cache).logits, logits)
        assert cache.kv == read_kv(config["quantization_config"]) == kv_format(ours)
        set_kv(ours, None)
        assert not torch.allclose(ours(IDS).logits, logits, rtol=1e-3)
    done = theirs.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    kinds = [type(layer).__name__ for layer in done.past_key_values.layers]
    assert kinds[-1] == "QuantisedLayer"
    theirs.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["kv_cache"] == kv


@pytest.mark.parametrize("kv", [KIVI, ROTATION, "kv4", "nsnquant-2bit"], ids=str)
def test_a_loaded_model_reads_its_cache_packed(source, tmp_path, monkeypatch, kv):
    """By ``load`` as by plain transformers, and says what it says with all keys and values read back."""
    calls: list[int] = []
    attend = attention_function.attend

    def counted(query: torch.Tensor, layer: QuantisedLayer, *rest: Any) -> torch.Tensor:
        calls.append(layer.get_seq_length())
        return attend(query, layer, *rest)

    monkeypatch.setattr(attention_function, "attend", counted)
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe_of(kv))
    # In float64: a code that depends on the last digit of a sum would make two right answers differ.
    for model in (quantkit.load(tmp_path / "out")[0].double(), load_tiny(tmp_path / "out").double()):
        found = decode(model)
        assert calls == [tokens for tokens in range(IDS.shape[1] + 1, IDS.shape[1] + 7) for _ in range(2)]
        calls.clear()
        set_kv(model, kv_format(model), "dense")
        torch.testing.assert_close(found, decode(model), rtol=1e-9, atol=1e-9)
        assert not calls


def decode(model: Any) -> torch.Tensor:
    """Logits [6, vocabulary] of tokens that are written behind the prompt, with the model's own cache."""
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    done = model.generate(IDS, output_logits=True, return_dict_in_generate=True, **settings)
    return torch.cat(done.logits[1:])


def test_a_model_with_another_attention_keeps_it(source, tmp_path):
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe_of(KIVI))
    flex = load_tiny(tmp_path / "out", attn_implementation="flex_attention")
    assert flex.config._attn_implementation == "flex_attention"
    eager = load_tiny(tmp_path / "out", attn_implementation="eager")
    assert eager.config._attn_implementation == attention_function.NAMES["eager"]
    with torch.inference_mode():
        torch.testing.assert_close(eager(IDS).logits, load_tiny(tmp_path / "out")(IDS).logits, rtol=1e-4, atol=1e-5)


def test_calibration_sees_what_the_model_will_see(source, tmp_path):
    """With no recent tokens in full precision o_proj gets another input, so other codes."""
    from safetensors.torch import load_file

    weights = []
    for kv in (None, KIVI | {"residual": 0}):
        out = tmp_path / str(len(weights))
        quantkit.quantize(str(source("llama")), output=out, recipe=recipe_of(kv, "gptq", format="quantkit"))
        weights.append(load_file(out / "model.safetensors"))
    moved = {key for key in weights[0] if "weight_packed" in key and not torch.equal(weights[0][key], weights[1][key])}
    assert "model.layers.0.self_attn.o_proj.weight_packed" in moved
    assert not any("layers.0.self_attn.q_proj" in key for key in moved)


def test_another_cache_than_the_checkpoints(source, tmp_path):
    out = tmp_path / "out"
    quantkit.quantize(str(source("llama")), output=out, method="rtn", scheme="W4A4KV4")
    model, _ = quantkit.load(out)
    with torch.inference_mode():
        own = model(IDS).logits
        cache = quantkit.kv_cache("kivi-2bit", model=model, group_size=8, residual=8)
        other = model(IDS, past_key_values=cache).logits
        assert not torch.allclose(own, other, rtol=1e-3)
        set_kv(model, cache.kv)
        assert torch.equal(model(IDS).logits, other)
        plain = quantkit.kv_cache("none", model=model)
        model(IDS, past_key_values=plain)  # whose layers stay what they are
        assert not any(isinstance(layer, QuantisedLayer) for layer in plain.layers)
        assert torch.equal(model(IDS, past_key_values=quantkit.kv_cache("kv4", model=model)).logits, own)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"kv": KIVI}, "kv: BertForMaskedLM does not predict the next token, so it has no cache; leave it out"),
        ("mistral", {"kv": KIVI}, "kv: kivi encodes several tokens together, and every layer of Mistral"),
        ("llama", {"kv": KIVI, "format": "compressed-tensors"}, "no field for keys and values by kivi in the cache"),
    ],
)
def test_what_cannot_be(source, tmp_path, name, changes, message):
    with pytest.raises(RecipeError, match=message):
        quantkit.quantize(str(source(name)), output=tmp_path / "out", recipe=recipe_of(**changes))
    assert not (tmp_path / "out").exists()


def test_commands(source, tmp_path):
    """quantize by a recipe in a file, inspect, generate and eval, with the checkpoint's cache and with others."""
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W4A16G32\nsteps: [rtn]\nkv: {method: kivi, bits: 4, group_size: 8, residual: 8}\n")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)

    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr
        return done

    run("quantize", source("llama"), "--recipe", recipe, "-o", out)
    assert (
        "keys and values in the cache: 4-bit codes (KIVI), keys per channel and 8 tokens" in run("inspect", out).stdout
    )
    assert json.loads(run("inspect", out, "--json").stdout)["kv_cache"]["method"] == "kivi"
    evaluate = ("eval", out, "--ppl", tmp_path / "text.txt", "--seqlen", "32", "--json")
    found = {
        kv: json.loads(run(*evaluate, *(("--kv", kv) if kv else ())).stdout)
        for kv in ("", "none", "rotation-2bit", "int8")
    }
    assert "kv_cache" not in found["none"]
    assert found[""]["kv_cache"]["format"] == {"method": "kivi", "bits": 4, "group_size": 8, "residual": 8}
    assert found["rotation-2bit"]["kv_cache"]["bits_per_element"] == pytest.approx(2 + 16 / 16, rel=0.05)
    assert found["int8"]["kv_cache"]["format"]["symmetric"]
    assert found["int8"]["kv_cache"]["bits_per_element"] == pytest.approx(8 + 16 / 16)
    values = [one["perplexity"]["text"]["value"] for one in found.values()]
    assert len(set(values)) == 4
    said = json.loads(run("generate", out, "The quick", "--max-new-tokens", "30", "--kv", "kivi-2bit", "--json").stdout)
    assert said["kv_cache"]["format"]["bits"] == 2
