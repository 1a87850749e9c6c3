"""Names of caches, what they stand for, how a checkpoint holds them, and what a wrong one is answered."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import TINY, make_tiny
from transformers import PreTrainedModel

import quantkit
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.config import read_kv
from quantkit.formats.kv import CacheFormat, KVFormat, kv_of
from quantkit.kv import methods
from quantkit.kv.attach import attentions, kv_format, kv_hooks, set_kv
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.interface import LayerFacts
from quantkit.recipe import build_recipe


def tiny(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return make_tiny(TINY[name](**changes))


@pytest.mark.parametrize("name", [name for name in methods.short_names() if name != "none"])
def test_every_name_makes_a_cache_and_is_stored_and_read_again(name):
    kv = kv_of(name.upper())
    assert kv is not None
    entry = kv.model_dump(mode="json")
    assert read_kv({"quant_method": "quantkit", "kv_cache": entry}) == kv
    assert kv.describe().startswith(f"{kv.bits if isinstance(kv, KVFormat) else kv.config.bits}-bit code")
    cache = quantkit.kv_cache(name, model=tiny())
    assert all(isinstance(layer, QuantisedLayer) for layer in cache.layers)
    assert cache.kv == kv


def test_names_are_settings():
    assert kv_of("kivi-4bit") == kv_of("kivi", {"bits": 4}) != kv_of("kivi-2bit")
    assert kv_of("kivi-2bit", {"residual": 64}) == kv_of("kivi", {"residual": 64})
    assert kv_of("none") is None
    eight = kv_of("int8")
    assert isinstance(eight, KVFormat)
    assert (eight.bits, eight.symmetric, eight.key_transform) == (8, True, "none")
    assert kv_of("kv4", seed=3) == KVFormat(bits=4, symmetric=False, clip=1.0, key_transform="hadamard", seed=3)


def test_every_row_has_what_a_row_needs():
    for name, row in methods.CACHE_METHODS.items():
        assert name == row.name
        config = row.settings()
        assert all(field.description for field in config.model_fields.values())
        if name != methods.MINMAX:
            row.check_no_file(config())
            kv = row.layer_kv(config(), LayerFacts(0, 64, 64))
            assert kv.keys.store().length == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kivy-2bit", {}, "unknown cache method 'kivy-2bit'. Did you mean 'kivi-2bit'?"),
        ("kivi-3bit", {}, "Did you mean 'kivi-2bit'|Did you mean 'kivi-4bit'"),
        ("kivi", {"bits": 3}, "cache method 'kivi': bits is 3: Input should be 2 or 4"),
        ("rotation", {"bit": 3}, "'bit' is not a setting. Did you mean 'bits'?"),
        ("kivi-2bit", {"residual": 50}, "residual 50 is no multiple of group_size 32"),
        ("../kivi", {}, "unknown cache method"),
        ("none", {"bits": 2}, "'none' leaves keys and values as they are: it has no settings"),
    ],
)
def test_wrong_requests(name, settings, message):
    with pytest.raises(RecipeError, match=message):
        quantkit.kv_cache(name, model=tiny(), **settings)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "kivi", "bits": 9}, r"kv_cache: cache method 'kivi': bits is 9: Input should be 2 or 4; .*damaged"),
        ({"method": "quantkit.kv.kivi"}, "unknown cache method"),
        ({"method": "kivi", "config": {"bits": 2}}, "'config' is not a setting"),
        ({"method": "nsnquant", "codebook": "/etc/passwd"}, "may not name a file; use one of e8, kmeans"),
        ({"method": "minmax", "bits": 4}, "stored without its name"),
        ({"method": 3}, "unknown cache method '3'"),
        ({"bits": 4}, r"kv_cache\.symmetric: Field required"),
        ("kivi", "kv_cache: Input should be a valid dictionary"),
    ],
)
def test_damaged_checkpoints(entry, message):
    with pytest.raises(QuantkitError, match=message):
        read_kv({"quant_method": "quantkit", "kv_cache": entry})


def test_a_cache_needs_a_model_and_a_method():
    with pytest.raises(RecipeError, match="needs the model that the cache is for"):
        quantkit.kv_cache("kivi-2bit")
    with pytest.raises(RecipeError, match="was given bits but no method"):
        quantkit.kv_cache(tiny(), bits=2)


def test_models_without_a_cache_are_refused():
    for name in ("bert", "bert_classifier"):
        for ask in (lambda model: quantkit.kv_cache("int8", model=model), lambda model: set_kv(model, kv_of("int8"))):
            with pytest.raises(
                QuantkitError, match=r"Bert\w+ does not predict the next token, so it has no cache; leave"
            ):
                ask(tiny(name))


def test_groups_leave_sliding_layers_to_transformers():
    model = tiny("gemma3")  # one layer with a window, one without
    cache = quantkit.kv_cache("kivi-2bit", model=model)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "QuantisedLayer"]
    set_kv(model, kv_of("kivi-2bit"))
    assert list(kv_hooks(model)) == [attentions(model)[1].path]
    assert [type(layer).__name__ for layer in quantkit.kv_cache(model).layers] == [
        "DynamicSlidingWindowLayer", "QuantisedLayer"
    ]  # fmt: skip
    assert all(isinstance(layer, QuantisedLayer) for layer in quantkit.kv_cache("rotation-2bit", model=model).layers)
    with pytest.raises(QuantkitError, match="kivi encodes several tokens together, and every layer of Mistral"):
        quantkit.kv_cache("kivi-2bit", model=tiny("mistral"))
    quantkit.kv_cache("kivi-2bit", model=tiny("mistral", sliding_window=None))


def test_what_was_learned_cannot_be_asked_for_by_name():
    model, kv = tiny(), kv_of("kv4")
    assert isinstance(kv, KVFormat)
    with pytest.raises(QuantkitError, match="this LlamaForCausalLM does not hold what was learned for the cache"):
        set_kv(model, kv.to_be_learned())


def test_a_model_is_told_another_cache_and_none():
    model = tiny()
    assert kv_format(model) is None
    for name in ("kv4", "kivi-2bit", "rotation-3bit"):
        set_kv(model, kv_of(name))
        assert kv_format(model) == kv_of(name)
        assert len(kv_hooks(model)) == 2
        assert quantkit.kv_cache(model).kv == kv_of(name)
    set_kv(model, None)
    assert not kv_hooks(model)
    with pytest.raises(QuantkitError, match="in full precision; name a method"):
        quantkit.kv_cache(model)


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        ("kivi-2bit", {"method": "kivi", "bits": 2, "group_size": 32, "residual": 128}),
        ({"method": "rotation", "bits": 3}, {"method": "rotation", "bits": 3, "gain": "unbiased", "seed": 0}),
        ({"method": "kivi-4bit", "residual": 32}, {"method": "kivi", "bits": 4, "group_size": 32, "residual": 32}),
        ("none", None),
        (None, None),
    ],
)
def test_a_recipe_names_a_cache(kv, expected):
    recipe = build_recipe({"scheme": "W4A16G64", "steps": ["rtn"], "kv": kv})
    assert recipe.kv == expected
    assert build_recipe(recipe.model_dump(mode="json")) == recipe
    if expected:
        assert isinstance(
            kv_of(recipe.kv["method"], {k: v for k, v in recipe.kv.items() if k != "method"}), CacheFormat
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": "kivy"}, "kv is no cache: unknown cache method 'kivy'. Did you mean 'kivi'"),
        ({"kv": {"bits": 4}}, "kv names no method; write kv: kivi-2bit"),
        ({"kv": {"method": "kivi", "bits": 5}}, "bits is 5: Input should be 2 or 4"),
        ({"kv": 4}, "kv is 4"),
        ({"kv": {"method": "nsnquant", "magnitudes": "mine.safetensors"}}, "may not name a file"),
        ({"kv": "kivi-2bit", "scheme": "W4A16KV4"}, "kv asks for kivi and the scheme for KV4; leave one of them out"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(RecipeError, match=message):
        build_recipe({"scheme": "W4A16G64", "steps": ["rtn"]} | changes)


def test_what_a_preset_stands_for_is_written_down():
    _, config = methods.request("nsnquant-1bit", {"preset": "paper"})
    stored = CacheFormat.model_validate({"method": "nsnquant", "config": config}).model_dump(mode="json")
    assert (stored["sink"], stored["min_recent"], stored["mean_bits_k"], stored["codebook"]) == (0, 64, 4, "kmeans")
    assert CacheFormat.model_validate(stored).config == config
