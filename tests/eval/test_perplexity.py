"""The number is that of an independent loop over plain transformers, whatever the batch; every limit is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import TINY, make_tiny
from tiny_tokenizer import TEXT, VOCABULARY, make_tokenizer
from transformers import PreTrainedModel

from quantkit.calibrate.text import Text
from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.perplexity import perplexity

LONG = Text("long", tuple(f"{n}. {TEXT}" for n in range(12)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny(TINY["llama"](vocab_size=VOCABULARY))


def plain_loop(model: PreTrainedModel, ids: list[int], seqlen: int) -> float:
    """The papers' loop: mean loss per window as transformers computes it, times seqlen, over all windows' tokens."""
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = torch.tensor([ids[start : start + seqlen]])
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.double() * seqlen)
    return math.exp(torch.stack(losses).sum() / (len(losses) * seqlen))


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom", "qwen2_moe"])
def test_equals_a_plain_loop(name: str, tokenizer: Any) -> None:
    model = make_tiny(TINY[name](vocab_size=VOCABULARY))
    ids = tokenizer(LONG.joined, add_special_tokens=False)["input_ids"]
    got = perplexity(model, tokenizer, LONG, seqlen=48, batch_size=5)
    assert got.value == pytest.approx(plain_loop(model, ids, 48), rel=1e-6)
    assert got.windows == len(ids) // 48
    assert got.tokens == got.windows * 47
    assert got.value > 1.5  # a model that saw the answers would be at 1


def test_long_rows_of_logits_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    whole = perplexity(model, tokenizer, LONG, seqlen=100)
    monkeypatch.setattr("quantkit.eval.perplexity.TOKENS_PER_CHUNK", 7)  # 99 predictions: the last chunk is short
    assert perplexity(model, tokenizer, LONG, seqlen=100).value == pytest.approx(whole.value, rel=1e-12)


def test_the_batch_changes_nothing(model: PreTrainedModel, tokenizer: Any) -> None:
    one, many = (perplexity(model, tokenizer, LONG, seqlen=32, batch_size=size) for size in (1, 7))
    assert many.value == pytest.approx(one.value, rel=1e-6)
    assert (many.tokens, many.windows) == (one.tokens, one.windows)


def test_max_tokens_and_what_is_left_over(model: PreTrainedModel, tokenizer: Any) -> None:
    got = perplexity(model, tokenizer, LONG, seqlen=32, max_tokens=70)
    ids = tokenizer(LONG.joined)["input_ids"][:70]
    assert got.value == pytest.approx(plain_loop(model, ids, 32), rel=1e-6)
    assert (got.windows, got.tokens) == (2, 62)
    assert got.protocol == (
        "one token stream, no special tokens, 2 non-overlapping windows of 32 tokens, each predicting 31; "
        "6 tokens at the end left out"
    )


def test_a_dataset_may_limit_its_windows(model: PreTrainedModel, tokenizer: Any) -> None:
    limited = Text("c4", LONG.documents, max_windows=3)
    assert perplexity(model, tokenizer, limited, seqlen=32).windows == 3


def test_bos_takes_the_place_of_one_token(model: PreTrainedModel, tokenizer: Any) -> None:
    got = perplexity(model, tokenizer, LONG, seqlen=16, max_tokens=30, bos=True)
    ids = tokenizer(LONG.joined)["input_ids"][:30]
    with_bos = [tokenizer.bos_token_id, *ids[:15], tokenizer.bos_token_id, *ids[15:]]
    assert got.value == pytest.approx(plain_loop(model, with_bos, 16), rel=1e-6)
    assert (got.tokens, got.windows) == (30, 2)
    assert "every window begins with BOS" in got.protocol
    assert "left out" not in got.protocol


def test_default_window_is_all_positions_up_to_2048(model: PreTrainedModel, tokenizer: Any) -> None:
    assert perplexity(model, tokenizer, LONG).seqlen == 128
    bloom = make_tiny(TINY["bloom"](vocab_size=VOCABULARY, max_position_embeddings=None))  # none to run out of
    assert perplexity(bloom, tokenizer, Text("t", (TEXT * 100,))).seqlen == 2048


def test_a_text_shorter_than_a_window_is_used_and_said(model: PreTrainedModel, tokenizer: Any) -> None:
    got = perplexity(model, tokenizer, Text("short", ("The quick brown fox",)), seqlen=64)
    ids = tokenizer("The quick brown fox")["input_ids"]
    assert got.value == pytest.approx(plain_loop(model, ids, len(ids)), rel=1e-6)
    assert (got.windows, got.tokens, got.seqlen) == (1, len(ids) - 1, len(ids))
    assert "shorter than one window of 64" in got.protocol


def test_progress_counts_windows(model: PreTrainedModel, tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(
        model, tokenizer, LONG, seqlen=32, max_tokens=96, batch_size=2, on_progress=lambda *event: seen.append(event)
    )
    assert seen == [("perplexity of long", 2, 3), ("perplexity of long", 3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 129}, "--seqlen 129 is more than the 128 positions that the model has; use 128"),
        ({"seqlen": 1}, "--seqlen 1 leaves no token to predict"),
    ],
)
def test_lengths_that_cannot_be(model: PreTrainedModel, tokenizer: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        perplexity(model, tokenizer, LONG, **options)


def test_one_token_is_not_enough(model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(QuantkitError, match="text 'dot' has 1 tokens; perplexity needs at least 2"):
        perplexity(model, tokenizer, Text("dot", (".",)))


def test_no_bos_token(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(RecipeError, match="has no BOS token"):
        perplexity(model, tokenizer, LONG, bos=True)


def test_a_foreign_tokenizer_is_found_out(tokenizer: Any) -> None:
    with pytest.raises(QuantkitError, match=r"the tokenizer gives token \d+ but the model embeds only 199"):
        perplexity(make_tiny(TINY["llama"]()), tokenizer, LONG)


def test_broken_weights_are_no_number(tokenizer: Any) -> None:
    model = make_tiny(TINY["llama"](vocab_size=VOCABULARY))
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(QuantkitError, match="logits on windows 1 to 2 of long are not finite"):
        perplexity(model, tokenizer, LONG, seqlen=32, batch_size=2)
