"""A saved cache goes on exactly where it stopped, in this process and in another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, VOCABULARY, make_tiny, save_tiny
from torch import Tensor
from transformers import PreTrainedModel

import quantkit
from quantkit.errors import QuantkitError
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import set_kv
from quantkit.kv.cache import KVCache

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi": ("kivi-2bit", {"group_size": 8, "residual": 8}),
    "rotation": ("rotation-3bit", {}),
    "int8": ("int8", {}),
    "kv4": ("kv4", {}),
    "nsnquant": ("nsnquant-1bit", {"window": 16, "min_recent": 0}),
    "none": ("none", {}),
}


def ids_of(tokens: int, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def filled(model: PreTrainedModel, kind: str, tokens: int = 27) -> KVCache:
    name, settings = KINDS[kind]
    cache = quantkit.kv_cache(name, model=model, **settings)
    model(ids_of(tokens), past_key_values=cache)
    return cache


@torch.no_grad()
def steps(model: PreTrainedModel, cache: KVCache, count: int = 9) -> Tensor:
    """Logits of ``count`` single tokens: enough for further groups to be encoded."""
    return torch.cat([model(token, past_key_values=cache).logits for token in ids_of(count).split(1, dim=1)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("gemma3", torch.float32), ("qwen3", torch.bfloat16)]
)
def test_a_loaded_cache_continues_bit_for_bit(tmp_path, name, dtype, kind):
    model = make_tiny(TINY[name](), dtype)
    cache = filled(model, kind)
    cache.save(tmp_path / "cache.safetensors")
    loaded = quantkit.load_cache(tmp_path / "cache.safetensors", model)
    assert loaded.get_seq_length() == 27
    assert loaded.kv == cache.kv
    assert loaded.memory_report().elements == cache.memory_report().elements
    assert torch.equal(steps(model, loaded), steps(model, cache))
    assert loaded.get_seq_length() == 36
    loaded.batch_select_indices(torch.tensor([1]))
    assert steps_of_one(model, loaded).shape[0] == 1


@torch.no_grad()
def steps_of_one(model: PreTrainedModel, cache: KVCache) -> Tensor:
    logits: Tensor = model(ids_of(1, 1), past_key_values=cache).logits
    return logits


def test_an_empty_cache_and_one_that_was_cropped(tmp_path):
    model = make_tiny(TINY["llama"]())
    path = tmp_path / "cache.safetensors"
    quantkit.kv_cache("kivi-2bit", model=model).save(str(path))
    assert quantkit.load_cache(str(path), model).get_seq_length() == 0
    cache = filled(model, "kivi")
    cache.crop(-3)  # more values are coded now than a cache of 24 tokens would have
    cache.save(path)
    assert torch.equal(steps(model, quantkit.load_cache(path, model)), steps(model, cache))


def test_the_models_own_cache(tmp_path):
    model = make_tiny(TINY["llama"]())
    set_kv(model, kv_of("rotation-2bit"))
    cache = quantkit.kv_cache(model)
    with torch.no_grad():
        model(ids_of(20), past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert torch.equal(steps(model, quantkit.load_cache(tmp_path / "cache", model)), steps(model, cache))


SCRIPT = """
import sys, torch, quantkit
model, _ = quantkit.load(sys.argv[1])
cache = quantkit.load_cache(sys.argv[2], model)
ids = torch.arange(5)[None].expand(2, -1)
with torch.no_grad():
    torch.save(model(ids, past_key_values=cache).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_another_process(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model, _ = quantkit.load(tmp_path / "model")
    cache = filled(model, "kivi")
    cache.save(tmp_path / "cache")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "model", tmp_path / "cache", tmp_path / "logits"],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with torch.no_grad():
        expected = model(torch.arange(5)[None].expand(2, -1), past_key_values=cache).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-6, atol=1e-6)


def rewritten(path: Path, **metadata: str) -> Path:
    """The same tensors with other metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        held = dict(file.metadata())
    save_file(load_file(path), path, held | metadata)
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no tensors"), "cannot read .*; name a file written by save"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "is no cache that this version of quantkit has saved"),
        (lambda path: rewritten(path, version="2"), "is no cache that this version"),
        (lambda path: rewritten(path, kv="{"), "cache cannot be made again"),
        (lambda path: rewritten(path, kv=json.dumps({"method": "nsnquant", "codebook": "/x"})), "may not name a file"),
        (lambda path: save_file({}, path, {"format": "quantkit-kv-cache", "version": "1"}), "cannot be made again"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    model = make_tiny(TINY["llama"]())
    path = tmp_path / "cache"
    filled(model, "kivi").save(path)
    damage(path)
    with pytest.raises(QuantkitError, match=message) as caught:
        quantkit.load_cache(path, model)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_missing(tmp_path):
    model = make_tiny(TINY["llama"]())
    path = tmp_path / "cache"
    filled(model, "kivi").save(path)
    tensors = load_file(path)
    del tensors["1.values"]
    metadata = {"format": "quantkit-kv-cache", "version": "1", "layers": json.dumps(["QuantisedLayer"] * 2)}
    save_file(tensors, path, metadata | {"kv": json.dumps({"method": "kivi", "bits": 2})})
    with pytest.raises(QuantkitError, match=r"has no tensor '1\.values': it is damaged"):
        quantkit.load_cache(path, model)


def test_a_cache_of_another_model(tmp_path):
    model, path = make_tiny(TINY["llama"]()), tmp_path / "cache"
    filled(model, "kivi").save(path)
    with pytest.raises(QuantkitError, match=r"holds 2 layers .* has 3 .*: it is of another model"):
        quantkit.load_cache(path, make_tiny(TINY["llama"](num_hidden_layers=3)))
    with pytest.raises(QuantkitError, match="another batch or another model"):
        steps(make_tiny(TINY["qwen3"]()), quantkit.load_cache(path, make_tiny(TINY["qwen3"]())))
    with pytest.raises(QuantkitError, match="so it has no cache"):
        quantkit.load_cache(path, make_tiny(TINY["bert"]()))


def test_what_cannot_be_written(tmp_path):
    cache = filled(make_tiny(TINY["llama"]()), "int8")
    with pytest.raises(QuantkitError, match=r"cannot write .*No such file or directory"):
        cache.save(tmp_path / "nowhere" / "cache")
