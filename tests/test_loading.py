import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import layer_format, load_plain, logits, quantise
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny

import quantkit
from quantkit.errors import QuantkitError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.loading import check_writes_text

Tiny = Callable[..., Path]
FOUR = layer_format("W4ZA16G32")


@pytest.fixture
def packed(tiny: Tiny, tmp_path) -> Path:
    quantise(tiny("llama"), tmp_path / "packed", lambda name: FOUR, "native")
    return tmp_path / "packed"


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_float_model(tiny: Tiny):
    model, tokenizer = quantkit.load(tiny("llama", torch.bfloat16))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer is None
    assert torch.equal(logits(model), logits(load_plain(tiny("llama", torch.bfloat16))))


@pytest.mark.parametrize("name", ["bert", "bert_classifier"])
def test_the_class_is_the_one_that_was_saved(tiny: Tiny, name):
    model, _ = quantkit.load(tiny(name))
    expected = load_tiny(tiny(name))
    assert type(model) is type(expected)
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(QuantkitError, match=f"a test needs a causal language model.*{type(expected).__name__}"):
        check_writes_text(model, "a test")


def test_a_causal_model_writes_text(tiny: Tiny):
    check_writes_text(quantkit.load(tiny("llama"))[0], "a test")


def test_the_demo_model_comes_with_its_tokenizer():
    model, tokenizer = quantkit.load("demo")
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("import os").input_ids, skip_special_tokens=True) == "import os"
    assert model.config.vocab_size >= len(tokenizer)


def test_a_native_model(packed):
    model, _ = quantkit.load(str(packed), dtype=torch.bfloat16, device_map="cpu")
    assert type(model.model.layers[0].mlp.up_proj) is QuantLinear
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight_packed"),
            "no tensor 'model.layers.1.mlp.up_proj.weight_pa",
        ),
        (lambda t: [t.pop(name) for name in list(t) if "q_proj.weight_sc" in name], "q_proj.weight_scale' and 1 more"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight' as \[3\], config.json says \[64\]"),
        (lambda t: t.update({"lm_head.weight_scale": torch.ones(3)}), "'lm_head.weight_scale', which config.json doe"),
    ],
    ids=["missing", "several missing", "wrong shape", "left over"],
)
def test_a_damaged_checkpoint(packed, edit, message):
    edit_tensors(packed, edit)
    with pytest.raises(QuantkitError, match=message):
        quantkit.load(packed)


def test_tensors_that_no_model_loads_are_allowed(packed):
    edit_tensors(packed, lambda tensors: tensors.update({"mtp.head.weight": torch.ones(3)}))
    quantkit.load(packed)


def test_the_wrong_config_for_the_tensors(packed):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][0]["weights"]["bits"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(QuantkitError, match="weight_packed' as"):
        quantkit.load(packed)


def test_what_quantkit_does_not_run(tiny: Tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }  # fmt: skip
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantkitError, match=r"group_0.format is 'float-quantized'; .* with transformers"):
        quantkit.load(tmp_path / "fp8")
