"""Static activations from source folder to reloaded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from handmade import load_plain, logits
from safetensors.torch import load_file
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer

import quantkit

CALIBRATION = {"nsamples": 12, "seqlen": 24, "batch_size": 5}


def quantised(name: str, scheme: str, folder: Path) -> Path:
    save_tiny(name, folder / "source", vocab_size=VOCABULARY)
    save_tokenizer(folder / "source")
    quantkit.quantize(
        str(folder / "source"), output=folder / "out", method="rtn", scheme=scheme, calibration=CALIBRATION
    )
    return folder / "out"


@pytest.mark.parametrize(
    ("name", "scheme", "method"),
    [
        ("llama", "W8A8TS", "compressed-tensors"),
        ("llama", "W8A8ZTS", "compressed-tensors"),
        ("opt", "W6A6ZTS", "quantkit"),
        ("qwen2_moe", "W8A8TS", "quantkit"),  # plain transformers leaves activations of experts alone
    ],
)
def test_ranges_are_stored_shared_and_used(tmp_path, name, scheme, method):
    out = quantised(name, scheme, tmp_path)
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == method
    stored = load_file(out / "model.safetensors")
    scales = {key: tensor for key, tensor in stored.items() if key.endswith(".input_scale")}
    assert len(scales) == sum(key.endswith(".weight_scale") for key in stored)
    assert all(tensor.shape == (1,) and 0 < float(tensor) < torch.inf for tensor in scales.values())
    zero_points = [tensor for key, tensor in stored.items() if key.endswith(".input_zero_point")]
    assert len(zero_points) == (len(scales) if "ZTS" in scheme else 0)
    assert all(tensor.dtype == torch.int8 for tensor in zero_points)
    q = next(key for key in scales if "0.self_attn.q_proj" in key)
    for reader in "kv":
        assert torch.equal(scales[q.replace("q_proj", f"{reader}_proj")], scales[q])
    assert len({float(scale) for scale in scales.values()}) > 4  # and other inputs have ranges of their own

    model, _ = quantkit.load(out, dtype="float32")
    found = logits(model)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, model.config.vocab_size, (2, 13), generator=generator)
    with torch.no_grad():
        alone = model(tokens[1:], use_cache=False).logits
    torch.testing.assert_close(alone, found[1:], rtol=1e-4, atol=1e-4)
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        assert torch.equal(logits(load_plain(out)), found)


def test_a_quantile_narrows_the_ranges(tmp_path):
    save_tiny("llama", tmp_path / "source", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "source")
    found = {}
    for quantile in (1.0, 0.8):
        activations = {"granularity": "tensor", "dynamic": False, "quantile": quantile}
        scheme = {"weights": {"bits": 8, "group_size": -1}, "activations": activations}
        recipe = {"scheme": scheme, "steps": ["rtn"], "calibration": CALIBRATION}
        out = tmp_path / str(quantile)
        quantkit.quantize(str(tmp_path / "source"), output=out, recipe=recipe)
        stored = load_file(out / "model.safetensors")
        found[quantile] = {key: float(value) for key, value in stored.items() if key.endswith(".input_scale")}
    first = "model.layers.0.self_attn.q_proj.input_scale"
    assert 0.3 * found[1.0][first] < found[0.8][first] < found[1.0][first]
