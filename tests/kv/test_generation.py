"""Every architecture generates with every kind of cache what it generates with a cache that is made by hand.

By hand: transformers' own layers, which keep keys and values as they came, and round all of them anew in every call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, TINY, VOCABULARY, make_tiny
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import quantkit
from quantkit.errors import QuantkitError
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import set_kv
from quantkit.kv.cache import KVCache, QuantisedLayer
from quantkit.kv.chunks import ChunkStore
from quantkit.kv.interface import LayerKV

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi": ("kivi-2bit", {"group_size": 8, "residual": 8}),
    "rotation": ("rotation-2bit", {}),
    "nsnquant": ("nsnquant-2bit", {"window": 16, "sink": 2, "min_recent": 0}),
}
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def float64(name: str, **changes: Any) -> PreTrainedModel:
    model = make_tiny(TINY[name](**changes)).double()
    if "moe" in name or name == "mixtral":
        model.set_experts_implementation("eager")  # the other one has no float64
    return model


def ids_of(batch: int = 2, tokens: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


class Rounding(DynamicLayer):
    """All that was ever given, rounded at once."""

    def __init__(self, kv: LayerKV) -> None:
        super().__init__()
        self.kv = kv

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.kv.round(*super().update(keys, values))


class RoundingWindow(DynamicSlidingWindowLayer):
    """Each token rounded by itself as it comes."""

    def __init__(self, kv: LayerKV, window: int) -> None:
        super().__init__(window)
        self.kv = kv

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(*self.kv.round(keys, values))


def by_hand(cache: KVCache) -> DynamicCache:
    """A cache that does what ``cache``, an empty one, does."""
    made = DynamicCache()
    made.layer_class_to_replicate = None
    for layer in cache.layers:
        if not isinstance(layer, QuantisedLayer):
            made.layers.append(type(layer)(layer.sliding_window))
        else:
            kv = layer.kv
            made.layers.append(Rounding(kv) if layer.window is None else RoundingWindow(kv, layer.window))
    return made


def model_of(name: str, method: str = "") -> PreTrainedModel:
    """In float64: a code that depends on the last digit of a sum would make two right answers differ."""
    changes = {"sliding_window": None} if name in ("mistral", "phi3") and method not in ("", "rotation") else {}
    return float64(name, **changes)


def padded() -> tuple[Tensor, Tensor]:
    """ids [2, 21], the first row with five tokens of padding on the left, and their mask."""
    ids = ids_of(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids * mask, mask


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CAUSAL)
def test_generating(name, method):
    model, (ids, mask) = model_of(name, method), padded()
    if name == "bloom":
        model = model.float()  # padded, its float64 is NaN without quantkit as well
    short, settings = METHODS[method]
    for more in ({}, {"prefill_chunk_size": 6}, {"num_beams": 3}):
        cache = quantkit.kv_cache(short, model=model, **settings)
        hand = by_hand(cache)
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, **SETTINGS, **more)
        expected = model.generate(ids, attention_mask=mask, past_key_values=hand, **SETTINGS, **more)
        assert found.tolist() == expected.tolist()
        batch = 2 * more.get("num_beams", 1)
        assert cache.get_seq_length() == 28
        report = cache.memory_report()
        assert report.bytes > 0
        for layer in cache.layers:
            if isinstance(layer, QuantisedLayer) and layer.window is None:
                keys, values = layer._like
                assert layer.elements == batch * 28 * keys.shape[1] * (keys.shape[3] + values.shape[3])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_forward_without_a_cache_gives_what_one_with_a_cache_gives(name, method):
    """Which is why a perplexity may be measured by either; and crop takes the last token back."""
    model, ids = model_of(name, method), ids_of(2, 26)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        short, settings = METHODS[method]
        set_kv(model, kv_of(short, settings))
        without = model(ids, use_cache=False).logits
        cache = quantkit.kv_cache(model)
        assert torch.equal(model(ids, past_key_values=cache).logits, without)
        assert torch.equal(model(ids).logits, without)  # with a cache of transformers, which is replaced
        assert (without - plain).abs().max() > 1e-3 * plain.abs().max()
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return
        first = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == 26
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, first, rtol=1e-9, atol=1e-9)


def test_perplexity_is_of_what_a_cache_gives_back(speaking):
    from quantkit.calibrate.text import Text
    from quantkit.eval.kv_memory import filled_cache
    from quantkit.eval.perplexity import perplexity, token_windows

    model, tokenizer, text = speaking
    loaded = Text("text", (text,))
    assert filled_cache(model, 32) is None
    plain = perplexity(model, tokenizer, loaded, seqlen=32).value
    for name in ("kivi-2bit", "rotation-2bit", "int8"):
        set_kv(model, kv_of(name, {"group_size": 8, "residual": 8} if "kivi" in name else {}))
        found = perplexity(model, tokenizer, loaded, seqlen=32, stream=False)
        windows = token_windows(model, tokenizer, loaded, seqlen=32).tokens
        with torch.no_grad():
            logits = model(windows, past_key_values=quantkit.kv_cache(model)).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten())
        assert found.value == pytest.approx(float(loss.exp()), rel=1e-5)
        assert found.value != pytest.approx(plain, rel=1e-6)
        cache = filled_cache(model, 32)
        assert cache is not None
        assert cache.get_seq_length() == 32
        assert cache.memory_report().bits_per_element < 16
    set_kv(model, None)
    assert perplexity(model, tokenizer, loaded, seqlen=32).value == plain


class AsItCame:
    """A method that forgets nothing, by way of chunks."""

    def store(self) -> ChunkStore:
        return ChunkStore(self, unit=4, chunk=8, recent=3)

    def round(self, states: Tensor) -> Tensor:
        return states

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        return {"units": states.unflatten(2, (-1, 4))}

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        return parts["units"].flatten(2, 3)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_that_forgets_nothing_is_transformers_own(name):
    model, (ids, mask) = model_of(name), padded()
    if name == "bloom":
        model = model.float()
    for more in ({}, {"prefill_chunk_size": 6}, {"num_beams": 3}):
        cache = quantkit.kv_cache("none", model=model)
        cache.layers = [
            QuantisedLayer(LayerKV(AsItCame(), AsItCame())) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, **SETTINGS, **more)
        assert found.tolist() == model.generate(ids, attention_mask=mask, **SETTINGS, **more).tolist()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_candidates_are_taken_back(name):
    """Drafts from the prompt: what is refused leaves no trace; groups are encoded once their tokens are accepted."""
    model, ids = model_of(name), ids_of(1, 9).repeat(1, 3)
    cache = KVCache([QuantisedLayer(LayerKV(AsItCame(), AsItCame())) for _ in range(2)])
    settings = SETTINGS | {"max_new_tokens": 30, "prompt_lookup_num_tokens": 4}
    found = model.generate(ids, past_key_values=cache, **settings)
    assert found.tolist() == model.generate(ids, **SETTINGS | {"max_new_tokens": 30}).tolist()
    assert cache.layers[0]._keys.coded > 24
    for method, (short, more) in METHODS.items():
        cache = quantkit.kv_cache(short, model=model_of(name, method), **more)
        assert model.generate(ids, past_key_values=cache, **settings).shape == found.shape


def test_a_cache_is_gone_on_with():
    model, ids = model_of("qwen3"), ids_of(2, 21)
    for short, more in METHODS.values():
        cache = quantkit.kv_cache(short, model=model, **more)
        hand = by_hand(cache)
        answers = []
        for one in (cache, hand):
            said = model.generate(ids, past_key_values=one, **SETTINGS)
            answers.append(model.generate(torch.cat([said, ids[:, :7]], 1), past_key_values=one, **SETTINGS).tolist())
        assert answers[0] == answers[1]


def test_caches_that_are_not_made_for_this_are_refused():
    model, ids = model_of("llama"), ids_of()
    set_kv(model, kv_of("kivi-2bit"))
    with pytest.raises(QuantkitError, match=r"StaticLayer; pass past_key_values=.* and no cache_implementation"):
        model.generate(ids, cache_implementation="static", **SETTINGS)
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(QuantkitError, match="an offloaded cache is not made for; leave cache_implementation="):
        model(ids, past_key_values=cache)


def test_another_model_or_batch_is_refused():
    model = model_of("llama")
    cache = quantkit.kv_cache("kivi-2bit", model=model)
    with torch.no_grad():
        model(ids_of(2), past_key_values=cache)
        with pytest.raises(QuantkitError, match="the cache holds keys of 2 sequences with 2 heads of 16 numbers"):
            model(ids_of(3, 1), past_key_values=cache)
        with pytest.raises(QuantkitError, match="another batch or another model"):
            model_of("qwen3")(ids_of(2, 1), past_key_values=cache)
        cache.reset()
        with pytest.raises(QuantkitError, match="a model of 2 layers and was given keys of layer 2"):
            float64("llama", num_hidden_layers=3)(ids_of(2), past_key_values=cache)
        cache.reset()
        shallow = float64("llama", num_hidden_layers=1)
        shallow(ids_of(2), past_key_values=cache)
        with pytest.raises(
            QuantkitError, match="2 quantised layers, of which 1 hold all tokens: it is of another model"
        ):
            shallow(ids_of(2, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["kivi-2bit", "rotation-2bit", "int8", "nsnquant-2bit"])
def test_keys_that_are_not_numbers_show(name):
    model, ids = model_of("llama"), ids_of(1, 30)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
        output = model(ids, past_key_values=quantkit.kv_cache(name, model=model))
    assert output.logits.isnan().any()
