"""Calibration windows: where they come from, and every text that gives none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import TINY, make_tiny
from tiny_tokenizer import TEXT, make_tokenizer
from transformers import PreTrainedTokenizerFast

from quantkit import demo
from quantkit.calibrate import data
from quantkit.calibrate.data import draw_windows, token_windows
from quantkit.calibrate.generate import generate_windows
from quantkit.errors import QuantkitError, RecipeError
from quantkit.recipe import Calibration

TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
)
CHAT = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "The quick brown fox."}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def windows(tokenizer: Any, source: Path | str, vocab_size: int = 320, **settings: Any) -> torch.Tensor:
    return token_windows(
        Calibration(**({"source": str(source), "nsamples": 4, "seqlen": 16} | settings)),
        tokenizer,
        vocab_size=vocab_size,
    )


def in_stream(window: torch.Tensor, stream: list[int]) -> list[int]:
    """Places of ``window`` in ``stream``."""
    ids = window.tolist()
    return [start for start in range(len(stream) - len(ids) + 1) if stream[start : start + len(ids)] == ids]


class TestWindows:
    def test_are_pieces_of_the_text(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = tmp_path / "text.txt"
        path.write_text(" ".join(str(number) for number in range(400)))
        stream = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        found = windows(tokenizer, path)
        assert found.shape == (4, 16)
        assert found.dtype == torch.int64
        assert all(in_stream(window, stream) for window in found)
        assert torch.equal(found, windows(tokenizer, path, batch_size=1))
        assert not torch.equal(found, windows(tokenizer, path, seed=1))

    def test_do_not_overlap_and_may_stand_anywhere(self) -> None:
        seen = torch.zeros(40)
        first_in_text = torch.zeros(3)
        for seed in range(400):
            found = draw_windows(torch.arange(40), 3, 10, torch.Generator().manual_seed(seed))
            assert len(found.unique()) == 30
            assert torch.equal(found, found[:, :1] + torch.arange(10))
            seen[found.flatten()] += 1
            first_in_text[found[:, 0].argmin()] += 1
        assert seen.min() > 60
        assert first_in_text.min() > 100  # the samples are not in the order of the text

    def test_take_a_text_to_its_last_token(self) -> None:
        found = draw_windows(torch.arange(30), 3, 10, torch.Generator().manual_seed(0))
        assert torch.equal(found.flatten().sort().values, torch.arange(30))

    def test_default_is_the_bundled_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        stream = tokenizer(demo.calibration_text_path().read_text(encoding="utf-8"))["input_ids"]
        found = token_windows(Calibration(nsamples=2, seqlen=64), tokenizer, vocab_size=320)
        assert all(in_stream(window, stream) for window in found)

    def test_of_a_long_text_only_parts_are_tokenised(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "_TOKENISED_WHOLE", 1)
        path = tmp_path / "text.txt"
        path.write_text("".join(chr(ord("a") + number * 26 // 40000) for number in range(40000)))
        asked: list[str] = []

        def spy(text: str, **options: Any) -> Any:
            asked.append(text)
            return tokenizer(text, **options)

        spied: Any = spy
        spied.chat_template = None
        found = windows(spied, path)
        assert [len(text) for text in asked] == [4 * 16 * 16 // 4] * 4
        assert [path.read_text().index(text) // 10000 for text in asked] == [0, 1, 2, 3]  # from all over it
        assert found.shape == (4, 16)


class TestChat:
    def write(self, folder: Path, conversation: Any, key: str = "messages") -> Path:
        path = folder / "chat.jsonl"
        path.write_text("\n".join(json.dumps({"id": 1, key: conversation}) for _ in range(9)))
        return path

    def with_template(self, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    def test_goes_through_the_template(self, tmp_path: Path) -> None:
        tokenizer = self.with_template()
        text = "<s>user: Who is there?</s><s>assistant: The quick brown fox.</s>"
        stream = tokenizer("\n\n".join([text] * 9))["input_ids"]
        assert tokenizer.bos_token_id in stream
        found = windows(tokenizer, self.write(tmp_path, CHAT))
        assert all(in_stream(window, stream) for window in found)

    def test_in_a_column_of_another_name(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, CHAT, key="turns")
        assert windows(self.with_template(), path, column="turns").shape == (4, 16)
        with pytest.raises(RecipeError, match=r"line 1 has no column 'text'; its columns: id, turns\. Choose one"):
            windows(self.with_template(), path)

    def test_without_a_template(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"tokenizer has no chat template; calibrate on plain text"):
            windows(self.with_template(None), self.write(tmp_path, CHAT))

    def test_refused_by_the_template(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, [{"role": "robot", "content": "x"}])
        with pytest.raises(QuantkitError, match=r"chat\.jsonl line 1: .* template refuses the conversation: no robots"):
            windows(self.with_template(), path)

    @pytest.mark.parametrize("conversation", [["hello"], [{"role": "user"}]])
    def test_no_conversation(self, conversation: Any, tmp_path: Path) -> None:
        with pytest.raises(QuantkitError, match=r"line 1: column 'messages' holds a list; a conversation is a list of"):
            windows(self.with_template(), self.write(tmp_path, conversation))


class TestTooLittle:
    @pytest.mark.parametrize(
        ("repeats", "way_out"), [(3, r"use --nsamples 3, or give more text"), (1, r"use --seqlen \d+ at most, or give")]
    )
    def test_says_how_much(
        self, repeats: int, way_out: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = tmp_path / "short.txt"
        path.write_text(TEXT * repeats)
        tokens = len(tokenizer(TEXT * repeats)["input_ids"])
        seqlen = tokens // repeats - 1 if repeats > 1 else tokens + 1
        with pytest.raises(
            QuantkitError,
            match=rf"'short' has {tokens} tokens, but 4 samples of {seqlen} take {4 * seqlen}; {way_out}",
        ):
            windows(tokenizer, path, seqlen=seqlen)

    def test_just_enough(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_text("The " * 64)  # a token each
        tokens = len(tokenizer("The " * 64)["input_ids"])
        assert windows(tokenizer, path, nsamples=1, seqlen=tokens).shape == (1, tokens)
        with pytest.raises(QuantkitError, match=f"has {tokens} tokens"):
            windows(tokenizer, path, nsamples=1, seqlen=tokens + 1)

    def test_empty(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("  \n")
        with pytest.raises(QuantkitError, match=r"empty\.txt is empty"):
            windows(tokenizer, tmp_path / "empty.txt")

    def test_not_utf8(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "old.txt").write_bytes("für".encode("latin-1"))
        with pytest.raises(QuantkitError, match=r"old\.txt is not UTF-8"):
            windows(tokenizer, tmp_path / "old.txt")


def test_a_foreign_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(QuantkitError, match=r"gives token \d+ but the model embeds only 199: they do not belong"):
        windows(tokenizer, "demo", vocab_size=199)


def test_generated(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny(TINY["llama"](vocab_size=320, eos_token_id=1, bos_token_id=0))
    settings = Calibration(source="generated", nsamples=3, seqlen=12, batch_size=2, seed=5, scripts=("latin",))
    found = token_windows(settings, tokenizer, vocab_size=320, load_model=lambda: model)
    assert torch.equal(found, generate_windows(model, tokenizer, nsamples=3, seqlen=12, seed=5))
    with pytest.raises(RecipeError, match="only be generated by a model that is loaded"):
        token_windows(settings, tokenizer, vocab_size=320)


class TestSettings:
    def test_windows_are_no_longer_than_the_model_takes(self) -> None:
        fitted, note = Calibration(nsamples=128, seqlen=2048).fitted(SimpleNamespace(max_position_embeddings=512))
        assert (fitted.seqlen, fitted.nsamples) == (512, 128)
        assert note == "calibration windows have 512 tokens instead of 2048: the model has no more positions."

    @pytest.mark.parametrize("config", [SimpleNamespace(max_position_embeddings=2048), SimpleNamespace()])
    def test_others_stay(self, config: SimpleNamespace) -> None:
        """Models with alibi have no last position."""
        assert Calibration().fitted(config) == (Calibration(), None)

    @pytest.mark.parametrize("bad", [{"nsamples": 0}, {"seqlen": 1}, {"batch_size": 0}, {"seed": -1}, {"texts": 1}])
    def test_checked(self, bad: dict[str, int]) -> None:
        with pytest.raises(ValidationError):
            Calibration(**bad)  # type: ignore[arg-type]
