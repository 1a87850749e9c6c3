"""Perplexity of a quantised cache as generating would find it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY, make_tiny
from tiny_tokenizer import TEXT, VOCABULARY, make_tokenizer
from transformers import DynamicCache

from quantkit.calibrate.text import Text
from quantkit.eval.fidelity import fidelity
from quantkit.eval.kv_memory import cache_facts
from quantkit.eval.perplexity import perplexity, window_losses
from quantkit.eval.streaming import call_ends, held_by, share_of_codes
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import set_kv
from quantkit.kv.kivi import Keys, Values
from quantkit.kv.quantiser import MinMax

LONG = Text("long", tuple(f"{n}. {TEXT}" for n in range(12)))
SETTINGS: dict[str, dict[str, Any]] = {
    "nsnquant": {"window": 16, "sink": 3, "min_recent": 5},
    "kivi": {"group_size": 8, "residual": 16},
    "rotation": {"bits": 2},
    "int8": {},
}


def tiny(name: str, settings: dict[str, Any]) -> Any:
    model = make_tiny(TINY["llama"](vocab_size=VOCABULARY)).double()
    set_kv(model, kv_of(name, settings), "dense")
    return model


@torch.no_grad()
def one_by_one(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Losses [windows], every token in a call of its own."""
    losses = []
    for window in windows:
        cache = DynamicCache(config=model.config)
        rows = [model(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1] for token in window[:-1]]
        losses.append(torch.nn.functional.cross_entropy(torch.stack(rows).float(), window[1:]).double())
    return torch.stack(losses)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_one_token_at_a_time(name):
    model, tokenizer, length = tiny(name, SETTINGS[name]), make_tokenizer(), 61
    ids = tokenizer(LONG.joined, add_special_tokens=False, return_tensors="pt")["input_ids"][0, : 3 * length]
    expected = one_by_one(model, ids.view(3, length))
    settings = {"seqlen": length, "max_tokens": 3 * length, "batch_size": 2}
    found = window_losses(model, tokenizer, LONG, stream=True, **settings)
    assert torch.allclose(found.nll, expected, rtol=0, atol=1e-6)
    at_the_end = window_losses(model, tokenizer, LONG, stream=False, **settings)
    by_token = name in ("rotation", "int8")
    assert torch.allclose(at_the_end.nll, expected, rtol=0, atol=1e-6) == by_token
    assert found.protocol.endswith("; keys and values are read as they are held when each token comes")
    assert at_the_end.protocol.endswith("as they are held at the end of a window, which is read in one pass")


@pytest.mark.parametrize("stream", [True, False])
def test_a_comparison_reads_the_cache_in_the_same_way(stream):
    model, baseline, tokenizer = tiny("nsnquant", SETTINGS["nsnquant"]), tiny("int8", {}), make_tokenizer()
    set_kv(baseline, None)
    settings = {"seqlen": 61, "max_tokens": 183, "batch_size": 2, "stream": stream}
    found = fidelity(model, tokenizer, baseline, tokenizer, LONG, **settings)
    alone = perplexity(model, tokenizer, LONG, **settings)
    assert found.perplexity.value == pytest.approx(alone.value, rel=1e-6)
    assert found.perplexity.protocol == alone.protocol
    assert "keys and values" not in found.baseline_perplexity.protocol
    assert found.baseline_perplexity.value == pytest.approx(perplexity(baseline, tokenizer, LONG, **settings).value)
    assert found.divergence is not None
    assert found.divergence.kl > 0


def test_full_precision_is_read_in_one_pass():
    model, tokenizer = make_tiny(TINY["opt"](vocab_size=VOCABULARY)), make_tokenizer()
    whole, stream = (perplexity(model, tokenizer, LONG, seqlen=32, stream=stream) for stream in (False, True))
    assert stream.value == pytest.approx(whole.value, rel=1e-6)
    assert call_ends(held_by(model), 32) == [32]
    assert share_of_codes([], 32) == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_stores_hold_as_codes_what_they_say(name):
    """What reads back changed is held as codes."""
    model = tiny(name, SETTINGS[name])
    width = model.config.head_dim
    for store in held_by(model)[:2]:
        states = torch.randn(1, 1, 61, width, generator=torch.Generator().manual_seed(0))
        for number in range(61):
            store.put(states[:, :, number : number + 1])
            read = store.read(0, number + 1, torch.float32)
            changed = (read != states[:, :, : number + 1]).any(-1).sum().item()
            assert changed == store.coded_after(number + 1)


def test_calls_end_where_something_is_encoded():
    chunks, singly, at_once = Keys(2, 8, 16).store(), Values(2, 8, 16).store(), MinMax(8).store()
    assert call_ends([at_once], 40) == [40]
    assert call_ends([chunks, at_once], 40) == [15, 31, 40]
    assert call_ends([Keys(2, 8, 0).store()], 20) == [7, 15, 20]
    assert call_ends([singly], 20) == [16, 17, 18, 19, 20]


def test_share_of_what_is_read_from_codes():
    assert share_of_codes([MinMax(8).store()], 40) == 1
    # tokens 0 .. 15 are read as codes by the 25 tokens that come when they are
    expected = sum(16 for n in range(1, 41) if n >= 16) + sum(16 for n in range(1, 41) if n >= 32)
    assert share_of_codes([Keys(2, 8, 16).store()], 40) == expected / 820


def test_facts_of_a_cache():
    model = tiny("nsnquant", {"window": 16, "sink": 0, "min_recent": 0, "mean_bits_k": 4}).float()
    facts, width = cache_facts(model, 32, stream=False), model.config.head_dim
    assert facts["read_from_codes"] == 1
    assert cache_facts(model, 32, stream=True)["read_from_codes"] == pytest.approx((16 * 16 + 32) / 528, abs=1e-4)
    group = next(size for size in (32, 16, 8) if width % size == 0)
    expected = 2 + (20 + 32 / 16 + (4 + 32 / group) * width / 16) / width
    assert facts["bits_of_codes"] == pytest.approx(expected, abs=1e-3)
    assert cache_facts(make_tiny(TINY["llama"]()), 32, stream=True) == {}
