"""The rotary embedding against the keys that models put into their caches.

A text of one token again and again has the same key everywhere in front of the rotary embedding: at the first layer,
and, since attention averages equal values, at all others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, TINY, make_tiny
from transformers import CohereConfig, DynamicCache, LlamaConfig, Phi3Config, Qwen2VLConfig

from quantkit.kv.rope import Rope, rope_of, why_not

WITHOUT = ("opt", "bloom")
TOKENS = 11
LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}


def rotated_keys(model: Any, start: int = 0) -> list[torch.Tensor]:
    """[batch, heads, tokens, head_dim] of each layer, of equal tokens."""
    cache = DynamicCache()  # keeps what leaves a window, too
    with torch.no_grad():
        positions = torch.arange(start, start + TOKENS)[None]
        model(torch.full((1, TOKENS), 5), past_key_values=cache, position_ids=positions, use_cache=True)
    return [layer.keys for layer in cache.layers]


def assert_same_everywhere(keys: torch.Tensor, rope: Rope) -> None:
    plain = rope.unrotate(keys, torch.arange(TOKENS))
    scale = keys.abs().max()
    assert (keys - keys[:, :, :1]).abs().max() > 0.1 * scale
    torch.testing.assert_close(plain, plain[:, :, :1].expand_as(plain), rtol=0, atol=2e-4 * scale.item())


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in WITHOUT])
def test_keys_of_every_architecture(name):
    model = make_tiny(TINY[name]())
    for layer, keys in enumerate(rotated_keys(model)):
        rope = rope_of(model, layer)
        assert rope is not None
        assert_same_everywhere(keys, rope)
        assert rope == rope_of(model.config, layer)
        assert why_not(model, layer) == ""


@pytest.mark.parametrize("start", [1, 1000])
def test_a_constant_offset_is_a_constant_rotation(start):
    model = make_tiny(TINY["llama"]())
    assert_same_everywhere(rotated_keys(model, start)[0], rope_of(model, 0))


def test_layers_have_frequencies_of_their_own():
    config = TINY["gemma3"]()  # a local and a global layer
    assert rope_of(config, 0) != rope_of(config, 1)
    assert rope_of(TINY["gpt_neox"](), 0).rotary_dim == 8  # of 16
    assert rope_of(CohereConfig(**LLAMA), 0).interleaved


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_scaled_frequencies(kind):
    """YaRN and LongRoPE multiply rotated keys by a constant, which stays in."""
    more = {
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "longrope": {
            "short_factor": [1.5] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
        },
    }[kind]  # fmt: skip
    settings = {"rope_type": kind, "rope_theta": 1e4, **more}
    kind_of = Phi3Config if kind == "longrope" else LlamaConfig
    config = kind_of(**LLAMA, max_position_embeddings=256, rope_parameters=settings, pad_token_id=0)
    rope = rope_of(config, 0)
    assert rope is not None
    assert rope.rotary_dim == (8 if kind == "longrope" else 16)
    assert rope != rope_of(LlamaConfig(**LLAMA), 0)
    assert_same_everywhere(rotated_keys(make_tiny(config))[0], rope)


def test_what_cannot_be_undone_has_a_reason():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**LLAMA, rope_parameters=dynamic)
    assert rope_of(config, 0) is None
    assert "dynamic NTK" in why_not(config, 0)
    axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    pictures = Qwen2VLConfig(text_config={**LLAMA, "rope_parameters": axes})
    assert rope_of(pictures, 0) is None
    assert "M-RoPE" in why_not(pictures, 0)


@pytest.mark.parametrize("name", WITHOUT)
def test_there_may_be_none(name):
    config = TINY[name]()
    assert rope_of(config, 0) is None
    assert why_not(config, 0) == ""


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 12])
def test_rotations(interleaved, width):
    """Of two channels by hand, far out; what is not rotated stays, and shapes broadcast."""
    rope = Rope((1.0, 0.1, 0.01, 0.001), interleaved)
    x = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slots = torch.tensor([[0, 1, 2, 3, 100_000]] * 3)
    found = rope.rotate(x, slots)
    for token, slot in enumerate(slots[0].tolist()):
        for pair, frequency in enumerate(rope.frequencies):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
            angle = torch.tensor(slot * frequency, dtype=torch.float64)
            turned = torch.complex(x[:, :, token, a], x[:, :, token, b]) * torch.polar(torch.ones_like(angle), angle)
            torch.testing.assert_close(found[:, :, token, a], turned.real)
            torch.testing.assert_close(found[:, :, token, b], turned.imag)
    assert torch.equal(found[..., 8:], x[..., 8:])
    torch.testing.assert_close(rope.unrotate(found, slots), x)
    assert torch.equal(found, rope.rotate(x, slots[0]))
