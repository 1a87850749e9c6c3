"""Models whose attention finds the cache behind the keys: they generate what they generate without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, TINY, VOCABULARY, make_tiny
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

import quantkit
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.kv import kv_of
from quantkit.kv import attention_function
from quantkit.kv.attach import attentions, set_kv
from quantkit.kv.attention_function import MOST_QUERIES, NAMES, _lendings, _packed, why_dense
from quantkit.kv.cache import Lent, QuantisedLayer

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi": ("kivi-2bit", {"group_size": 8, "residual": 8}),
    "rotation": ("rotation-2bit", {}),
    "kv4": ("kv4", {}),
    "nsnquant": ("nsnquant-2bit", {"window": 16, "sink": 2, "min_recent": 0}),
}
SETTINGS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def model_of(name: str, method: str = "nsnquant", **changes: Any) -> PreTrainedModel:
    """In float64: a code that depends on the last digit of a sum would make two right answers differ."""
    if name in ("mistral", "phi3") and method not in ("rotation", "kv4"):
        changes["sliding_window"] = None
    model = make_tiny(TINY[name](**changes)).double()
    if "moe" in name or name == "mixtral":
        model.set_experts_implementation("eager")  # the other one has no float64
    return model


def ids_of(batch: int = 2, tokens: int = 21) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def padded() -> tuple[Tensor, Tensor]:
    """ids [2, 21], the first row with five tokens of padding on the left, and their mask."""
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids * mask, mask


def cache_of(model: PreTrainedModel, method: str = "nsnquant", attention: str | None = None) -> Any:
    short, settings = METHODS[method]
    return quantkit.kv_cache(short, model=model, attention=attention, **settings)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """(queries, tokens) of every attention that was packed."""
    made: list[tuple[int, int]] = []
    attend = attention_function.attend

    def counted(query: Tensor, layer: QuantisedLayer, *rest: Any) -> Tensor:
        made.append((query.shape[2], layer.get_seq_length()))
        return attend(query, layer, *rest)

    monkeypatch.setattr(attention_function, "attend", counted)
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "bloom"])
def test_generating(name, method, calls):
    model, (ids, mask) = model_of(name, method), padded()
    dense = model.generate(ids, attention_mask=mask, past_key_values=cache_of(model, method, "dense"), **SETTINGS)
    assert not calls
    cache = cache_of(model, method, "packed")
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **SETTINGS)
    assert found.tolist() == dense.tolist()
    packed = [layer for layer in cache.layers if isinstance(layer, QuantisedLayer) and layer.window is None]
    assert calls == [(1, tokens) for tokens in range(22, 31) for _ in packed]
    assert packed or name in ("mistral", "phi3")


def test_masks_are_made_for_it():
    """Under a name that transformers makes no masks for, padding would be read like any token."""
    for before in ("sdpa", "eager"):
        model = model_of("llama")
        model.set_attn_implementation(before)
        cache_of(model, attention="packed")
        name = model.config._attn_implementation
        assert name == NAMES[before]
        assert all(name in known().valid_keys() for known in (AttentionInterface, AttentionMaskInterface))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_and_blocks_of_candidates(name, calls):
    model, ids = model_of(name), ids_of(1, 9).repeat(1, 3)
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 10}):
        answers = []
        for attention in ("dense", "packed"):
            cache = cache_of(model, attention=attention)
            answers.append(model.generate(ids, past_key_values=cache, **SETTINGS | more).tolist())
        assert answers[0] == answers[1]
    assert {queries for queries, _ in calls} >= {1, 5, 7}  # candidates, what is left of the prompt


def test_only_a_few_queries_are_packed(calls):
    model = model_of("llama")
    caches = [cache_of(model, attention=attention) for attention in ("packed", "dense")]
    with torch.no_grad():
        for tokens, packed in ((MOST_QUERIES, 0), (MOST_QUERIES, 2), (MOST_QUERIES + 1, 0), (2, 2)):
            calls.clear()  # the first is a prompt without a mask
            found, expected = (model(ids_of(2, tokens), past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            assert len(calls) == packed


def test_the_first_call_is_the_proof(calls):
    """All keys are read back once; what attention does with them is the same from the beginning."""
    model = model_of("llama")
    cache = cache_of(model, attention="packed")
    assert not any(lending.proven for lending in _lendings(model))
    with torch.no_grad():
        model(ids_of(2, 1), past_key_values=cache)
        assert all(lending.proven for lending in _lendings(model))
        quantkit.kv_cache("kv4", model=model, attention="packed")
        assert all(lending.proven for lending in _lendings(model))  # another cache does not begin anew
    assert len(calls) == 2


def losing(before: str) -> Any:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        return _packed(before, module, query, key * 1.0, value, mask, **rest)

    return attention


def test_keys_that_are_changed_on_their_way_keep_the_dense_path(calls, monkeypatch):
    model, ids = model_of("llama"), ids_of()
    expected = model.generate(ids, past_key_values=cache_of(model, attention="dense"), **SETTINGS)
    cache = cache_of(model, attention="packed")
    monkeypatch.setitem(AttentionInterface._global_mapping, NAMES["sdpa"], losing("sdpa"))
    assert model.generate(ids, past_key_values=cache, **SETTINGS).tolist() == expected.tolist()
    assert not calls
    assert not any(lending.proven for lending in _lendings(model))


def test_keys_that_are_changed_later_stop_the_model(monkeypatch):
    model = model_of("llama")
    cache = cache_of(model, attention="packed")
    with torch.no_grad():
        model(ids_of(), past_key_values=cache)
        monkeypatch.setitem(AttentionInterface._global_mapping, NAMES["sdpa"], losing("sdpa"))
        with pytest.raises(QuantkitError, match=r"LlamaAttention of layer 0 changes keys .* use attention='dense'"):
            model(ids_of(2, 1), past_key_values=cache)


def test_what_cannot_be_packed_says_so():
    bloom = make_tiny(TINY["bloom"]())
    with pytest.raises(QuantkitError, match="attention of BloomForCausalLM is not called through a registered"):
        quantkit.kv_cache("int8", model=bloom, attention="packed")
    assert not any(layer.packed for layer in quantkit.kv_cache("int8", model=bloom).layers)
    with pytest.raises(RecipeError, match="attention is 'flash'; use one of packed, dense"):
        quantkit.kv_cache("int8", model=model_of("llama"), attention="flash")
    flex = model_of("llama")
    flex.set_attn_implementation("flex_attention")
    assert "has the attention implementation 'flex_attention'" in why_dense(flex, attentions(flex))


def test_a_cpu_packs_unless_told_otherwise():
    model = model_of("llama")
    assert not any(layer.packed for layer in quantkit.kv_cache("int8", model=model, attention="dense").layers)
    assert model.config._attn_implementation == "sdpa"
    assert all(layer.packed for layer in quantkit.kv_cache("int8", model=model).layers)
    assert model.config._attn_implementation == NAMES["sdpa"]


def test_a_model_that_is_told_generates_with_its_own_cache(calls):
    model, ids = model_of("qwen3"), ids_of()
    kv = kv_of(*METHODS["nsnquant"])
    set_kv(model, kv, "dense")
    expected = model.generate(ids, **SETTINGS).tolist()
    assert not calls
    set_kv(model, kv, "packed")
    assert model.generate(ids, **SETTINGS).tolist() == expected
    assert len(calls) == 2 * 9
    assert copy.deepcopy(model).generate(ids, **SETTINGS).tolist() == expected
    assert len(calls) == 4 * 9
    set_kv(model, None)
    assert model.config._attn_implementation == "sdpa"
    assert not _lendings(model)


def test_only_quantised_caches_are_read_by_themselves(calls, tmp_path):
    """Of a model that is set up; nor does its checkpoint say anything of it."""
    model, ids = model_of("llama"), ids_of()
    expected = model.generate(ids, **SETTINGS).tolist()
    cache_of(model, attention="packed")
    assert model.generate(ids, past_key_values=DynamicCache(), **SETTINGS).tolist() == expected
    assert model(ids, use_cache=False).logits.requires_grad
    assert not calls
    model.save_pretrained(tmp_path)
    assert "quantkit" not in (tmp_path / "config.json").read_text()


def test_a_cache_that_may_be_packed_serves_a_model_that_is_not(calls):
    model, other, ids = model_of("llama"), model_of("llama"), ids_of()
    expected = model.generate(ids, past_key_values=cache_of(model, attention="dense"), **SETTINGS).tolist()
    assert other.generate(ids, past_key_values=cache_of(model, attention="packed"), **SETTINGS).tolist() == expected
    cache = cache_of(model, attention="packed")
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, past_key_values=cache, **SETTINGS).tolist() == expected
    assert not calls


def test_gradients_and_weights_take_the_dense_path(calls):
    model = model_of("llama")
    model.set_attn_implementation("eager")
    cache = cache_of(model, attention="packed")
    with torch.no_grad():
        model(ids_of(), past_key_values=cache)
        weights = model(ids_of(2, 1), past_key_values=cache, output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, 1, 22)] * 2
    model(ids_of(2, 1), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert not calls


def test_a_loan_is_on_the_keys_alone():
    layer = quantkit.kv_cache("int8", model=model_of("llama"), attention="dense").layers[0]
    states = torch.randn(1, 2, 3, 16)
    layer.lent = lent = Lent(layer, whole=True)
    keys, values = layer.update(states, states)
    assert Lent.on(keys) is lent
    assert Lent.on(values) is None
    assert torch.equal(keys, layer.read()[0])
    assert Lent.on(layer.update(states, states)[0]) is None
