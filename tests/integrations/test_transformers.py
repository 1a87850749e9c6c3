"""Native checkpoints in plain ``from_pretrained``, in this process after ``import quantkit``."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import assert_saved_as_loaded, layer_format, load_plain, logits, quantise
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.errors import QuantkitError
from quantkit.layers.quant_experts import QuantExperts
from quantkit.layers.quant_linear import QuantLinear

Tiny = Callable[..., Path]
EIGHT, FOUR, THREE = layer_format("W8A8"), layer_format("W4ZA16G24"), layer_format("W3ZA16G16")
NF4 = layer_format("WNF4A16G64")
ONLINE = layer_format("W4ZA16G32", input_scale=True)


def dense_logits(folder: Path) -> torch.Tensor:
    model = load_plain(folder)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one multiplies in another order
    return logits(model)


@pytest.mark.parametrize("layer", [FOUR, THREE, NF4, ONLINE], ids=["W4Z short group", "W3Z", "NF4", "input scale"])
def test_equals_the_dense_model(tiny: Tiny, tmp_path, layer):
    quantise(tiny("llama"), tmp_path / "packed", lambda name: layer, "native", dense=tmp_path / "dense")
    model = load_plain(tmp_path / "packed")
    assert type(model.model.layers[1].mlp.down_proj) is QuantLinear
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(logits(model), dense_logits(tmp_path / "dense"), rtol=0, atol=2e-5)
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "opt", "bloom", "gpt_neox"])
def test_other_layouts(tiny: Tiny, tmp_path, name):
    """Tied heads, biases, fused projections, base model prefixes; two formats, one layer left out."""

    def choose(linear: str) -> layer_format:
        if ".0." in linear and linear.endswith(("down_proj", "fc2", "dense_4h_to_h")):
            return None
        return THREE if "att" in linear else FOUR

    quantise(tiny(name, torch.bfloat16), tmp_path / "packed", choose, "native", dense=tmp_path / "dense")
    model = load_plain(tmp_path / "packed")
    assert torch.equal(logits(model), dense_logits(tmp_path / "dense"))
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    "kept",
    [(), (".experts.1.",), ("layers.1.mlp.experts.", "self_attn"), (".experts.",)],
    ids=["all", "an expert kept", "a block's experts kept", "experts kept"],
)
def test_experts(tiny: Tiny, tmp_path, name, kept):
    def choose(linear: str) -> layer_format:
        return None if any(part in linear for part in kept) else FOUR

    formats = quantise(tiny(name), tmp_path / "packed", choose, "native", dense=tmp_path / "dense")
    model = load_plain(tmp_path / "packed")
    replaced = any(isinstance(module, QuantExperts) for module in model.modules())
    assert replaced == any(".experts." in linear for linear in formats)
    torch.testing.assert_close(logits(model), dense_logits(tmp_path / "dense"), rtol=0, atol=2e-5)
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


def test_eight_bit_experts_keep_their_codes(tiny: Tiny, tmp_path):
    """int8 storage calls its codes ``weight``, which transformers' rules for merging experts would take."""
    quantise(tiny("mixtral"), tmp_path / "packed", lambda name: EIGHT, "native")
    model = load_plain(tmp_path / "packed")
    assert model.model.layers[0].mlp.experts.get_submodule("3.w2").weight.dtype == torch.int8
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


def test_the_first_forward_leaves_the_model_packed(tiny: Tiny, tmp_path):
    quantise(tiny("llama"), tmp_path / "packed", lambda name: THREE, "native")
    model = load_plain(tmp_path / "packed")
    before = model.get_memory_footprint()
    first = logits(model)
    assert model.get_memory_footprint() == before < load_plain(tiny("llama")).get_memory_footprint() / 1.5
    assert torch.equal(logits(model), first)
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


def test_batches_with_left_padding_generate_the_same(tiny: Tiny, tmp_path):
    quantise(tiny("llama"), tmp_path / "packed", lambda name: FOUR, "native")
    model = load_plain(tmp_path / "packed")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    short = torch.tensor([[5, 6, 7]])
    batch = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 10, 11, 12, 13, 14]])
    together = model.generate(batch, attention_mask=(batch != 0).long(), **settings)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **settings)
    assert torch.equal(together[0, 6:], alone[0, 3:])


def test_another_dtype(tiny: Tiny, tmp_path):
    quantise(tiny("llama", torch.bfloat16), tmp_path / "packed", lambda name: FOUR, "native")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32
    assert layer.weight_packed.dtype == torch.int32
    torch.testing.assert_close(logits(model), logits(load_plain(tmp_path / "packed")), rtol=0, atol=0.2)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_map(tiny: Tiny, tmp_path, device_map):
    quantise(tiny("llama"), tmp_path / "packed", lambda name: FOUR, "native")
    model = load_plain(tmp_path / "packed", device_map=device_map)
    assert torch.equal(logits(model), logits(load_plain(tmp_path / "packed")))


def test_offloaded_blocks(tiny: Tiny, tmp_path):
    quantise(tiny("llama"), tmp_path / "packed", lambda name: FOUR, "native")
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = load_plain(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(load_plain(tmp_path / "packed")))


def test_a_config_for_another_model_is_refused(tiny: Tiny, tmp_path):
    quantise(tiny("llama"), tmp_path / "packed", lambda name: FOUR if ".0.mlp.up_proj" in name else None, "native")
    path = tmp_path / "packed" / "config.json"
    path.write_text(path.read_text().replace("layers.0.mlp.up_proj", "layers.0.mlp.upward"))
    with pytest.raises(QuantkitError, match=r"'model.layers.0.mlp.upward' .* is no linear of LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
