"""The calibrated rival: codebooks of neighbouring channels."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import TINY, make_tiny, save_tiny
from tiny_tokenizer import TEXT, VOCABULARY, make_tokenizer, save_tokenizer
from torch import Tensor
from transformers import DynamicCache

from quantkit.calibrate.text import Text
from quantkit.errors import RecipeError
from quantkit.eval import bench_rival
from quantkit.eval.coupled import Coupled, Kind, fit, k_means, nearest, use_coupled, watch
from quantkit.eval.perplexity import window_losses
from quantkit.kv.rope import Rope

LONG = Text("long", tuple(f"{n}. {TEXT}" for n in range(12)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids_of(windows: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(0))


def clusters() -> tuple[Tensor, Tensor]:
    """Two sets of eight points far apart, 40 vectors at each: (vectors [2, 320, 3], the points [2, 8, 3])."""
    points = 100 * drawn(2, 8, 3)
    return points.repeat(1, 40, 1) + 1e-3 * drawn(2, 320, 3, seed=1), points


def test_k_means_finds_what_lies_apart():
    vectors, points = clusters()
    books = k_means(vectors, torch.ones(2, 320), 8, 4, "0")
    for found, expected in zip(books, points, strict=True):
        assert torch.allclose(found[torch.cdist(expected, found).argmin(1)], expected, atol=1e-3)
    assert torch.equal(nearest(vectors, books), torch.cdist(vectors, books).argmin(-1))


def test_k_means_by_seed_and_weight():
    vectors, weights = drawn(3, 200, 2), torch.ones(3, 200)
    assert torch.equal(k_means(vectors, weights, 16, 3, "a"), k_means(vectors, weights, 16, 3, "a"))
    assert not torch.equal(k_means(vectors, weights, 16, 3, "a"), k_means(vectors, weights, 16, 3, "b"))
    weights[:, 0] = 999.0  # one codeword: the weighted mean
    (mean,) = k_means(vectors, weights, 1, 1, "a").unbind(1)
    assert torch.allclose(mean, (999 * vectors[:, 0] + vectors[:, 1:].sum(1)) / 1198, atol=1e-5)


def test_fewer_vectors_than_codewords():
    books = k_means(drawn(1, 3, 2), torch.ones(1, 3), 8, 2, "0")
    assert books.isfinite().all()
    assert nearest(drawn(1, 3, 2), books).max() < 8


def test_codes_are_those_of_keys_in_front_of_the_rotary_embedding():
    rope, books = Rope((1.0, 0.1, 0.01, 0.001)), drawn(2, 4, 16, 2).half()
    plain = books[torch.arange(2)[:, None, None], torch.arange(4), torch.randint(16, (2, 9, 4))].flatten(-2)[None]
    keys = rope.rotate(plain.float(), torch.arange(9))
    method = Coupled(books, rope)
    assert torch.allclose(method.round(keys), keys, atol=1e-5)
    assert not torch.allclose(Coupled(books, None).round(keys), keys, atol=0.1)
    store = method.store()
    for token in keys.split([4, 1, 4], dim=2):
        store.put(token)
    store.keep(2, 9)
    assert torch.allclose(store.read(0, 7, torch.float32), keys[:, :, 2:], atol=1e-5)
    assert sum(tensor.nbytes for name, tensor in store.state().items() if name == "codes") == 2 * 7 * 4


def test_gradients_are_those_of_the_loss():
    """A small step of one key changes the loss by the step times the gradient."""
    model, ids = make_tiny(TINY["llama"](vocab_size=VOCABULARY)).double(), ids_of(1, 9)
    seen = watch(model, ids)

    def loss(step: float) -> Tensor:
        class Moved(DynamicCache):
            def update(
                self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
            ) -> tuple[Tensor, Tensor]:
                key = key.clone()
                if layer == 1:
                    key[0, 1, 4, 3] += step
                return key, value

        logits = model(ids, past_key_values=Moved(config=model.config)).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum")

    with torch.no_grad():
        slope = (loss(0.02) - loss(-0.02)) / 0.04
    assert seen[1, 0][1][0, 1, 4, 3].item() == pytest.approx(slope.item(), rel=0.02)
    assert torch.equal(watch(model, ids, fisher=False)[1, 0][1], torch.ones_like(seen[1, 0][1]))


def test_enough_codewords_change_nothing():
    """As many codewords as there are tokens: what was learned from reads back as it was, and the loss is the same."""
    model, tokenizer = make_tiny(TINY["llama"](vocab_size=VOCABULARY)), make_tokenizer()
    settings = {"seqlen": 16, "max_tokens": 64}
    before = window_losses(model, tokenizer, LONG, **settings).nll
    windows = tokenizer(LONG.joined, add_special_tokens=False, return_tensors="pt")["input_ids"][0, :64].view(4, 16)
    use_coupled(model, fit(model, watch(model, windows, fisher=False), Kind.parse("4c6b"), iterations=1))
    assert torch.allclose(window_losses(model, tokenizer, LONG, **settings).nll, before, atol=2e-3)
    rough = make_tiny(TINY["llama"](vocab_size=VOCABULARY))
    use_coupled(rough, fit(rough, watch(rough, windows), Kind.parse("4c1b")))
    assert not torch.allclose(window_losses(rough, tokenizer, LONG, **settings).nll, before, atol=2e-3)


def test_names():
    assert Kind.parse("8C8b") == Kind(8, 8)
    assert Kind.parse("4c8b").bits_per_element == 2
    for wrong in ("4c9b", "c8b", "0c8b", "8b4c"):
        with pytest.raises(RecipeError, match="is no coupling"):
            Kind.parse(wrong)
    model = make_tiny(TINY["llama"](vocab_size=VOCABULARY))
    with pytest.raises(RecipeError, match="cannot be cut into groups of 7"):
        fit(model, watch(model, ids_of(1, 8)), Kind(7, 2))


def test_what_is_written(tmp_path):
    save_tiny("llama", tmp_path / "tiny", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "tiny")
    for name in ("fit", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name} and {TEXT} " * 20)
    texts = {"fit_texts": ["fit.txt"], "texts": ["fit.txt", "other.txt"]}
    settings = {"kinds": ["4c2b"], "nsamples": 3, "seqlen": 16, "max_tokens": 48, "iterations": 1}
    settings |= {"fisher": True, "seed": 0, "output": tmp_path / "out.json", "root": tmp_path}
    for _ in range(2):  # the second time there is nothing left to do
        bench_rival.main(["tiny"], **texts, **settings)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["kind"], row["fit"], row["text"]) for row in rows] == [
        ("4c2b", "fit", "fit"),
        ("4c2b", "fit", "other"),
    ]
    assert rows[0]["bits"] == 0.5
    assert all(row["perplexity"] > 1 and len(row["nll"]) == 3 for row in rows)
    with pytest.raises(RecipeError, match=r"'fit' has [0-9]+ tokens; to learn from it takes 80000 besides the 48"):
        bench_rival.main(["tiny"], **texts, **settings | {"nsamples": 5000})
