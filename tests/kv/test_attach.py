"""Models whose attention was told to keep keys and values quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, TINY, VOCABULARY, make_tiny
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from quantkit.errors import QuantkitError
from quantkit.formats.kv import KVFormat
from quantkit.kv.attach import attentions, kv_cache, layer_kv, quantise_kv, why_not
from quantkit.kv.cache import QuantisedLayer, RoundingCache, new_cache
from quantkit.kv.memory import memory_report

KV4 = KVFormat(bits=4, symmetric=False, clip=1.0, key_transform="hadamard", seed=0)
TOKENS = 11


def float64(name: str) -> PreTrainedModel:
    model = make_tiny(TINY[name]()).double()
    if "moe" in name or name == "mixtral":
        model.set_experts_implementation("eager")  # the other one has no float64
    return model


def quantised(name: str, kv: KVFormat = KV4) -> PreTrainedModel:
    """In float64: a code that depends on the last digit of a sum would make two right answers differ."""
    model = float64(name)
    quantise_kv(model, kv)
    return model


def ids_of(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def continued(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """Greedy, each token by a forward of its own without a cache: [batch, all tokens]."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
def stepwise(model: PreTrainedModel, ids: Tensor, split: list[int], cache: Any = None) -> Tensor:
    logits = []
    for part in ids.split(split, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_gives_what_a_forward_without_one_gives(name):
    model, ids = quantised(name), ids_of()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        plain = float64(name)(ids).logits
    assert (full - plain).abs().max() > 1e-3 * plain.abs().max()  # something is rounded
    for split in ([1] * TOKENS, [6, 1, 4], [TOKENS]):
        torch.testing.assert_close(stepwise(model, ids, split), full, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_generating_is_repeated_forwards(name):
    model, ids = quantised(name), ids_of()
    done = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert done.sequences.tolist() == continued(model, ids, 6).tolist()
    assert all(isinstance(layer, QuantisedLayer) for layer in done.past_key_values.layers)
    assert memory_report(done.past_key_values).elements > 0


def rounds(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that attention sees, layer by layer."""
    seen = []
    for one in attentions(model):
        kv = layer_kv(KV4, one.layer)

        def look(_: Any, args: Any, kwargs: Any, argument: str = one.argument, kv: Any = kv) -> None:
            cache = kwargs[argument]
            update = cache.update

            def watched(keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
                found = update(keys, values, *rest)
                seen.append((found, kv.round(keys, values)))
                return found

            cache.update = watched

        one.module.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    return seen


@pytest.mark.parametrize("name", CAUSAL)
def test_every_layer_is_rounded_with_signs_of_its_own(name):
    model = quantised(name)
    seen = rounds(model, ids_of())
    assert len(seen) == model.config.num_hidden_layers
    signs = set()
    for one in attentions(model):
        transform = layer_kv(KV4, one.layer).transform
        assert transform is not None
        transform.apply(torch.zeros(1, 64))
        signs.add(tuple(next(iter(transform.tensors())).tolist()))
    assert len(signs) == len(seen)
    for found, expected in seen:
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "bloom", "opt"])
def test_left_padding_is_as_if_it_were_not_there(name):
    model, ids = quantised(name), ids_of(1)
    model = model.float() if name == "bloom" else model  # padded, its float64 is NaN without quantkit as well
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    both = torch.cat([padded, ids_of(1, TOKENS + 5)])
    mask = torch.ones_like(both)
    mask[0, :5] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(ids, **settings)
    batched = model.generate(both, attention_mask=mask, **settings)
    assert batched[0, 5:].tolist() == alone[0].tolist()


def exact_beams(model: PreTrainedModel, ids: Tensor, beams: int, tokens: int) -> list[int]:
    """Beam search by forwards without a cache."""
    paths = [(0.0, ids)]
    for _ in range(tokens):
        found = []
        for score, path in paths:
            with torch.no_grad():
                logs = model(path, use_cache=False).logits[0, -1].log_softmax(-1)
            best = logs.topk(2 * beams)
            for gain, token in zip(best.values.tolist(), best.indices, strict=True):
                found.append((score + gain, torch.cat([path, token.view(1, 1)], dim=1)))
        paths = sorted(found, key=lambda pair: -pair[0])[:beams]
    result: list[int] = paths[0][1][0].tolist()
    return result


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_beams_take_their_codes_along(name):
    model, ids = quantised(name), ids_of(1, 5)
    settings: dict[str, Any] = {"num_beams": 3, "do_sample": False, "eos_token_id": None, "length_penalty": 0.0}
    found = model.generate(ids, max_new_tokens=5, **settings)
    assert found[0].tolist() == exact_beams(model, ids, 3, 5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sampling_chunks_and_copies_of_the_prompt(name):
    model, ids = quantised(name), ids_of(1)
    settings: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    greedy = model.generate(ids, do_sample=False, **settings).tolist()
    assert model.generate(ids, do_sample=False, prefill_chunk_size=4, **settings).tolist() == greedy
    assert model.generate(ids, do_sample=False, prompt_lookup_num_tokens=3, **settings).tolist() == greedy  # crops
    torch.manual_seed(1)
    drawn = model.generate(ids, do_sample=True, num_return_sequences=3, **settings)
    torch.manual_seed(1)
    assert model.generate(ids, do_sample=True, num_return_sequences=3, **settings).tolist() == drawn.tolist()
    assert len({tuple(row) for row in drawn.tolist()}) > 1


def test_whoever_holds_a_dynamic_cache_keeps_holding_it():
    model, ids = quantised("gemma2"), ids_of()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            assert cache.get_seq_length() == 6
            assert isinstance(cache.layers[0], QuantisedLayer)
            rest = model(ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(rest, full[:, 6:], rtol=1e-9, atol=1e-9)
        cache.reset()
        torch.testing.assert_close(stepwise(model, ids, [4, 7], cache), full, rtol=1e-9, atol=1e-9)


def test_caches_of_floats_are_refused():
    model, ids = quantised("llama"), ids_of()
    cache = DynamicCache()
    float64("llama")(ids, past_key_values=cache)
    with pytest.raises(QuantkitError, match="layer 0 in a DynamicLayer with 11 tokens in full precision; pass"):
        model(ids, past_key_values=cache)
    with pytest.raises(QuantkitError, match=r"layer 0 in a StaticLayer; pass past_key_values=quantkit.kv_cache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))


def test_a_new_cache_has_the_layers_that_transformers_would_make():
    model = quantised("gemma3")
    cache = new_cache(model.config, {one.layer: layer_kv(KV4, one.layer) for one in attentions(model)})
    assert [layer.window for layer in cache.layers] == [4, None]
    torch.testing.assert_close(stepwise(model, ids_of(), [5, 6], cache), stepwise(model, ids_of(), [TOKENS]))
    assert cache.get_seq_length() == TOKENS
    tokens = [3, TOKENS]  # a window of 4 holds 3 for the next one
    assert cache.memory_report().elements == 2 * 2 * sum(tokens) * 24


class Bare(nn.Module):
    """An attention that is called with its cache by position."""

    layer_idx = 1

    def forward(self, hidden: Tensor, layer_past: Any = None, mask: Any = None) -> Any:
        return layer_past, mask

    def call(self, *arguments: Any) -> Any:
        return self(torch.zeros(1), *arguments)


def test_a_cache_may_come_by_position():
    attention = Bare()
    quantise_kv(attention, KV4)
    assert isinstance(attention.call()[0], RoundingCache)
    for arguments in ((None, "mask"), (None,)):
        cache, mask = attention.call(*arguments)
        assert isinstance(cache, RoundingCache)
        assert mask == (arguments[1] if len(arguments) > 1 else None)
    given = DynamicCache()
    assert attention.call(given, "mask") == (given, "mask")
    assert isinstance(given.layers[1], QuantisedLayer)


def test_a_model_in_16_bits_generates_in_16_bits():
    model = make_tiny(TINY["qwen3"](), torch.bfloat16)
    quantise_kv(model, KV4)
    done = model.generate(ids_of(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    report = memory_report(done.past_key_values)
    assert report.bits_per_element == pytest.approx(4 + 24 / 32, rel=0.02)  # head_dim 32; signs are the rest
    with torch.no_grad():
        assert model(ids_of()).logits.dtype == torch.bfloat16


def test_training_reaches_keys_and_values_with_and_without_a_cache():
    gradients = []
    for use_cache in (False, True):
        model = quantised("llama")
        model(ids_of(), use_cache=use_cache).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_float_models_are_told_how_to_get_a_cache():
    with pytest.raises(QuantkitError, match=r"LlamaForCausalLM keeps keys and values in full precision; name a method"):
        kv_cache(make_tiny(TINY["llama"]()))


@pytest.mark.parametrize("name", TINY)
def test_every_attention_is_found_once(name):
    model = make_tiny(TINY[name]())
    assert [one.layer for one in attentions(model)] == list(range(model.config.num_hidden_layers))
    assert bool(why_not(model)) == (name not in CAUSAL)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_a_block_that_knows_its_number_is_no_attention(name):
    """It passes the cache on, whether the search starts above it or at it."""
    model = make_tiny(TINY[name]())
    assert [one.path for one in attentions(model.model.layers[0])] == ["self_attn"]
    assert [one.path for one in attentions(model.model.layers[0].self_attn)] == [""]
    assert len(attentions(model)) == 2
