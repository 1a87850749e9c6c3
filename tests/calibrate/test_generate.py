"""Text that a model writes: where it may begin, that the cache changes nothing, how it goes on, where it ends."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CAUSAL, TINY, make_tiny
from tiny_tokenizer import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from quantkit.calibrate import generate
from quantkit.calibrate.generate import first_tokens, generate_windows
from quantkit.errors import QuantkitError

SPARE = 7
"""Rows of the embedding that no token has."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_model(name: str, tokenizer: PreTrainedTokenizerFast, ends: int = 0) -> PreTrainedModel:
    """A tiny model, of whose ordinary tokens the first ``ends`` end a text, too."""
    # A tied head makes a random model repeat itself for ever.
    shape = {"vocab_size": len(tokenizer) + SPARE, "eos_token_id": 1, "bos_token_id": 0, "tie_word_embeddings": False}
    model = make_tiny(TINY[name](**shape))
    if ends:
        model.generation_config.eos_token_id = [1, *range(2, 2 + ends)]
    return model


def texts_of(row: Tensor, ends: set[int]) -> list[Tensor]:
    """A sample taken apart behind every end."""
    cuts = [place + 1 for place, token in enumerate(row.tolist()) if token in ends]
    return [part for part in torch.tensor_split(row, cuts) if len(part)]


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_writes_what_the_model_says_without_a_cache(
    name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text of a sample is written as if it stood alone: nothing of the one before it, no padding, no cache."""
    monkeypatch.setattr(generate, "GREEDY", (9, 9))  # longer than the windows of sliding attention
    model = make_model(name, tokenizer, ends=150)
    ends = set(model.generation_config.eos_token_id)
    ids = generate_windows(model, tokenizer, nsamples=3, seqlen=40, batch_size=2)
    texts = [text for row in ids for text in texts_of(row, ends)]
    assert len(texts) > 4
    assert max(len(text) for text in texts) > 10
    banned = [0, *ends, *range(len(tokenizer), len(tokenizer) + SPARE)]
    for text in texts:
        logits = model(text[None]).logits[0].index_fill(1, torch.tensor(banned), -torch.inf)
        assert torch.equal(text[1:10], logits[:-1].argmax(dim=1)[:9])


class TestSamples:
    def test_lengths_tokens_and_ends(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = make_model("llama", tokenizer, ends=60)
        ends = set(model.generation_config.eos_token_id)
        ids = generate_windows(model, tokenizer, nsamples=5, seqlen=37, batch_size=2)
        assert ids.shape == (5, 37)
        assert ids.dtype == torch.int64
        assert ids.max() < len(tokenizer)
        assert not (ids == tokenizer.bos_token_id).any()
        texts = [text for row in ids for text in texts_of(row, ends)]
        allowed = set(first_tokens(tokenizer, len(tokenizer), ["latin"])) - ends
        firsts = [int(text[0]) for text in texts]
        assert len(texts) > 8  # so some begin inside a sample
        assert set(firsts) <= allowed
        assert len(set(firsts)) == len(firsts) <= len(allowed)
        for row in ids:
            assert int(row[-1]) not in ends  # nothing would follow it
            assert all(len(text) > 4 for text in texts_of(row, ends)[:-1])  # at least three likeliest ones

    def test_the_seed_decides_and_batches_do_not(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = make_model("llama", tokenizer, ends=60)
        one, same, other = (
            generate_windows(model, tokenizer, nsamples=4, seqlen=20, batch_size=batch_size, seed=seed)
            for batch_size, seed in ((4, 0), (3, 0), (4, 1))
        )
        assert torch.equal(one, same)
        assert not (one == other).all(dim=1).any()

    def test_sampled_by_their_probability(self, tokenizer: PreTrainedTokenizerFast) -> None:
        writer = generate._Writer(make_model("llama", tokenizer), ends={1}, banned={0})
        logits = torch.tensor([3.0, 1.0, 0.5, -1.0, 2.0, -torch.inf])
        chances = (torch.arange(20000, dtype=torch.float64)) / 20000  # from 0, which must not hit the banned token 0
        many = logits.expand(20000, -1)
        chosen = writer._choose(many, torch.zeros(20000, dtype=torch.bool), False, chances)
        expected = torch.softmax(torch.tensor([-torch.inf, 1.0, 0.5, -1.0, 2.0, -torch.inf]), dim=0)
        torch.testing.assert_close(chosen.bincount(minlength=6) / 20000, expected, rtol=0, atol=2e-4)
        last = writer._choose(many, torch.zeros(20000, dtype=torch.bool), True, chances)
        assert sorted(last.unique().tolist()) == [2, 3, 4]

    def test_as_many_of_the_likeliest_as_were_drawn(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """A chance of almost 1 hits the last token of the vocabulary, so the others must be the likeliest."""
        writer = generate._Writer(make_model("llama", tokenizer), ends={1}, banned={0})
        greedy = torch.tensor([[3], [5]]).expand(2, 9)
        ids = writer.write(
            torch.tensor([[7], [8]]).expand(2, 9), greedy, torch.full((2, 9), 1 - 1e-12, dtype=torch.float64)
        )
        sampled = ids == len(tokenizer) + SPARE - 1
        assert sampled.tolist() == [[False] * 4 + [True] * 5, [False] * 6 + [True] * 3]

    def test_progress(self, tokenizer: PreTrainedTokenizerFast) -> None:
        said: list[tuple[str, int, int]] = []
        generate_windows(
            make_model("llama", tokenizer), tokenizer, nsamples=3, seqlen=5, batch_size=2,
            on_progress=lambda *values: said.append(values),
        )  # fmt: skip
        assert said == [("writing calibration text", 10, 15), ("writing calibration text", 15, 15)]

    def test_a_model_that_cannot_count(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = make_model("llama", tokenizer)
        model.lm_head.weight.data[5] = torch.nan
        with pytest.raises(QuantkitError, match=r"logits are NaN or Inf.* calibrate on a text"):
            generate_windows(model, tokenizer, nsamples=1, seqlen=5)


WORDS = [
    "<unk>", "<s>", "</s>", "the", "\u2581The", "\u2581", "  ", "<0x41>", "<unused3>", "[unused4]", "aaa", "=====",
    "\u4e2d\u6587", "\u043f\u0440\u0438", "\u00e9t\u00e9", "7", "it's", "();", "caf\u0435", "\u0661",
    "\ufffd", "<|spare|>", "last",
]  # fmt: skip


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<|spare|>", special=True)], special_tokens=True)
    return tokenizer


class TestFirstTokens:
    @pytest.mark.parametrize(
        ("scripts", "expected"),
        [
            (["latin"], ["the", "\u2581The", "\u00e9t\u00e9", "7", "it's", "last"]),
            (["cyrillic"], ["\u043f\u0440\u0438", "7"]),
            (["Latin", "CJK"], ["the", "\u2581The", "\u4e2d\u6587", "\u00e9t\u00e9", "7", "it's", "last"]),
            (
                ["latin", "cyrillic"],
                ["the", "\u2581The", "\u043f\u0440\u0438", "\u00e9t\u00e9", "7", "it's", "caf\u0435", "last"],
            ),
        ],
    )
    def test_rule(self, scripts: list[str], expected: list[str]) -> None:
        """ "caf\\u0435" ends in a Cyrillic letter; U+0661 is an Arabic digit."""
        found = first_tokens(word_tokenizer(), len(WORDS), scripts)
        assert [WORDS[token] for token in found] == expected

    def test_the_models_vocabulary_ends_earlier(self) -> None:
        assert len(WORDS) - 1 not in first_tokens(word_tokenizer(), len(WORDS) - 1, ["latin"])

    def test_no_such_script(self) -> None:
        with pytest.raises(QuantkitError, match=r"no token of the vocabulary is text in thai, so"):
            first_tokens(word_tokenizer(), len(WORDS), ["thai"])
