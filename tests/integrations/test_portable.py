"""Portable checkpoints: the same model in plain transformers with compressed-tensors and in quantkit's layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import assert_saved_as_loaded, layer_format, load_plain, logits, quantise
from transformers import PreTrainedModel

from quantkit.layers.quant_linear import QuantLinear
from quantkit.loading import load

pytest.importorskip("compressed_tensors")

Tiny = Callable[..., Path]
SCHEMES = [
    "W2SA16G8",
    "W4A16G8",
    "W8A16G8",
    "W4A16GC",
    "W8A16",
    "W8A8",
    "W8A8G8",
    "W4A8",
    "W4A4G8",
    "W8A8TS",
    "W8A8ZTS",
]


def plain(folder: Path) -> PreTrainedModel:
    model = load_plain(folder)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one multiplies in another order
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_logits_in_plain_transformers(tiny: Tiny, tmp_path, scheme, dtype):
    layer = layer_format(scheme)
    quantise(tiny("llama", dtype), tmp_path / "packed", lambda name: layer, "portable", dense=tmp_path / "dense")
    model, _ = load(tmp_path / "packed")
    assert type(model.model.layers[0].self_attn.q_proj) is QuantLinear
    ours = logits(model)
    assert torch.equal(ours, logits(plain(tmp_path / "packed")))
    if layer.activations is None:
        assert torch.equal(ours, logits(load_plain(tmp_path / "dense")))
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts(tiny: Tiny, tmp_path, name):
    layer = layer_format("W4A16G8")
    quantise(tiny(name), tmp_path / "packed", lambda name: layer, "portable", dense=tmp_path / "dense")
    model, _ = load(tmp_path / "packed")
    dense = plain(tmp_path / "dense")
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(model), logits(plain(tmp_path / "packed")), rtol=0, atol=2e-5)
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_schemes_in_one_model(tiny: Tiny, tmp_path, name):
    attention, rest = layer_format("W8A8"), layer_format("W4A16G8")

    def choose(linear: str) -> layer_format:
        if linear.endswith("layers.1.self_attn.o_proj"):
            return None
        return attention if "self_attn" in linear else rest

    quantise(tiny(name), tmp_path / "packed", choose, "portable")
    model, _ = load(tmp_path / "packed")
    torch.testing.assert_close(logits(model), logits(plain(tmp_path / "packed")), rtol=0, atol=2e-5)
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")


def test_zero_points_of_other_tools(tiny: Tiny, tmp_path):
    """We never write them portably, because newer compressed-tensors fails on them; we read them all the same."""
    layer = layer_format("W4ZA16G8")
    quantise(tiny("llama"), tmp_path / "packed", lambda name: layer, "portable", dense=tmp_path / "dense")
    model, _ = load(tmp_path / "packed")
    assert torch.equal(logits(model), logits(load_plain(tmp_path / "dense")))
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "again")
