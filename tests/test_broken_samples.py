"""Samples that a model answers with NaN or Inf: named, left out, and nothing that is finished is lost."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer

import quantkit
from quantkit.formats.writer import read_record

CALIBRATION = {"nsamples": 8, "seqlen": 16, "batch_size": 3}
METHODS = {
    "smoothquant+gptq+norm-tweaking": "W4A8", "os-plus": "W6A6", "awq": "W3A16G32", "asinq": "W3A16G32",
    "rtn+norm-tweaking": "W8A8TS", "omniquant": "W4A8", "affinequant": "W4A4",
}  # fmt: skip


def change(folder, name, function):
    tensors = load_file(folder / "model.safetensors")
    function(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def source(tmp_path):
    save_tiny("llama", tmp_path / "source", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("method", METHODS)
def test_some_samples(source, tmp_path, method):
    """A token whose embedding is infinite breaks the samples it is in, from the start."""
    from transformers import AutoTokenizer

    from quantkit.calibrate.data import token_windows
    from quantkit.recipe import Calibration

    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = token_windows(Calibration(**CALIBRATION), tokenizer, vocab_size=VOCABULARY, load_model=pytest.fail)
    token = int(windows[2, 5])
    change(source, "model.embed_tokens.weight", lambda weight: weight[token].fill_(torch.inf))
    result = quantkit.quantize(
        str(source), output=tmp_path / "out", method=method, scheme=METHODS[method], calibration=CALIBRATION
    )
    broken = (windows == token).any(dim=1).nonzero().flatten().tolist()
    named = [text for text in result.warnings if text.startswith("the embeddings: ")]
    assert all(f"sample {sample} (" in text for sample, text in zip(broken, named, strict=True))
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_sample(source, tmp_path, method):
    """The first block overflows: the second has no inputs to go by and is left to what needs none."""
    change(source, "model.layers.0.mlp.up_proj.weight", lambda weight: weight.mul_(1e6))
    change(source, "model.layers.0.mlp.down_proj.weight", lambda weight: weight.mul_(1e36))
    result = quantkit.quantize(
        str(source), output=tmp_path / "out", method=method, scheme=METHODS[method], calibration=CALIBRATION
    )
    assert sum("block 0: the output for calibration sample" in text for text in result.warnings) == 8
    record = read_record(tmp_path / "out" / "quantkit-run.jsonl")
    second = next(event for event in record if event.get("block") == 1)
    for fact in second["transforms"]:
        assert fact.get("loss", 0) <= fact.get("loss_before", 0)
        assert fact.get("scale_max", 1) == fact.get("scale_min", 1) == pytest.approx(1) or method == "asinq"
    if "gptq" in method:
        assert all("no input was ever active" in row["fallback"] for row in second["layers"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source_norm = load_file(source / "model.safetensors")["model.layers.1.input_layernorm.weight"]
    if method != "asinq":  # which needs no inputs to be SINQ
        assert torch.equal(stored["model.layers.1.input_layernorm.weight"], source_norm)
    assert all(tensor.isfinite().all() for name, tensor in stored.items() if "layers.1" in name)
