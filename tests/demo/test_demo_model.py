"""The bundled demo model: what it weighs, what it learned, and what it was not shown."""

import json
import platform
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import demo
from quantkit.demo import corpus, heldout, train, untrained


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((demo.model_path() / "training.json").read_text(encoding="utf-8"))
    return figures


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout_ids(tokenizer: Any) -> torch.Tensor:
    text = demo.heldout_text_path().read_text(encoding="utf-8")
    return torch.tensor(untrained.encode(tokenizer, text))


def test_weights_and_folder_stay_small() -> None:
    weights = demo.model_path() / "model.safetensors"
    assert 2_000_000 < weights.stat().st_size <= 8_000_000
    folder = Path(demo.__file__).parent
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 10_000_000


def test_shape_suits_quantisation(model: Any, record: dict[str, Any]) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim == 64
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(size % 128 == 0 for linear in linears for size in linear.weight.shape)
    assert 1_500_000 <= model.num_parameters() == record["parameters"] <= 4_000_000


def test_weights_on_disk_are_bfloat16() -> None:
    assert AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype="auto").dtype == torch.bfloat16


def test_tokenizer_is_fast_and_lossless(tokenizer: Any) -> None:
    text = 'def f(x):\n    """Naïve 数."""\n\treturn  x + 1\n'
    assert tokenizer.is_fast
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == untrained.encode(tokenizer, text)
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(tokenizer) == untrained.VOCAB_SIZE


def test_heldout_perplexity(model: Any, heldout_ids: torch.Tensor, record: dict[str, Any]) -> None:
    """The whole of the card's measurement: single files differ too much for a sample to stand for it."""
    value, count = heldout.perplexity(model, heldout_ids)
    assert count == record["heldout"]["scored_tokens"]
    assert value < record["heldout"]["unigram_perplexity"] / 10
    assert value == pytest.approx(record["heldout"]["perplexity"], rel=0.01)


def test_damage_shows(heldout_ids: torch.Tensor) -> None:
    """Rounding every projection to a few levels per row must cost perplexity, or the model would measure nothing."""
    damaged = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32).eval()
    sample = heldout_ids[:4096]
    before, _ = heldout.perplexity(damaged, sample)
    with torch.no_grad():
        for name, parameter in damaged.named_parameters():
            if name.endswith("proj.weight"):
                scale = parameter.abs().amax(dim=1, keepdim=True) / 3
                parameter.copy_((parameter / scale).round() * scale)
    after, _ = heldout.perplexity(damaged, sample)
    assert after > 1.1 * before


def test_greedy_text_mostly_goes_on_after_real_text(
    model: Any, heldout_ids: torch.Tensor, record: dict[str, Any]
) -> None:
    loops = [heldout.is_loop(tokens) for tokens in heldout.greedy_continuations(model, heldout_ids)]
    assert len(loops) == record["heldout"]["greedy_contexts"]
    assert sum(loops) <= len(loops) / 2


def test_loop_is_recognised() -> None:
    assert heldout.is_loop([1, 2, 3] * 16)
    assert not heldout.is_loop(list(range(48)))


@pytest.mark.parametrize("prompt", ["def main(", "class Path", "    def __init__(self, ", "Return a list of "])
def test_greedy_text_is_made_of_the_words_of_the_library(model: Any, tokenizer: Any, prompt: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert max(len(list(run)) for _, run in groupby(output)) <= 4  # no token over and over
    words = re.findall(r"[A-Za-z]{3,}", tokenizer.decode(output, skip_special_tokens=True))
    library = set(re.findall(r"[A-Za-z]{3,}", demo.calibration_text_path().read_text(encoding="utf-8")))
    assert len(words) >= 6
    assert sum(word in library for word in words) >= 0.9 * len(words)


def test_greedy_code_has_the_form_of_a_function(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("\n\ndef ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=48, do_sample=False)[0])
    assert re.match(r"\s*def \w+\([^)]*\):\n +\S", text)


def test_heldout_files_are_not_trained_on(record: dict[str, Any]) -> None:
    trained = set(corpus.training_files())
    assert len(trained) > 100
    assert trained.isdisjoint(corpus.heldout_files())
    # The choice goes by path alone, so it holds for the shipped text under any Python release.
    assert trained.isdisjoint(record["heldout_files"])


def test_shipped_text_is_what_the_corpus_gives(record: dict[str, Any]) -> None:
    if platform.python_version() != record["python"]:
        pytest.skip(f"the shipped text is that of Python {record['python']}")
    assert demo.heldout_text_path().read_text(encoding="utf-8") == corpus.heldout_text()
    assert demo.calibration_text_path().read_text(encoding="utf-8") == corpus.calibration_text()


def test_calibration_text_is_large_enough(tokenizer: Any) -> None:
    text = demo.calibration_text_path().read_text(encoding="utf-8")
    assert len(untrained.encode(tokenizer, text)) > 32_768


def test_card_gives_the_recorded_figures(record: dict[str, Any]) -> None:
    card = (demo.model_path() / "README.md").read_text(encoding="utf-8")
    assert f"| this model | {record['heldout']['perplexity']:.2f} |" in card
    assert f"add-one smoothing | {record['heldout']['unigram_perplexity']:.1f} |" in card
    assert f"seed {record['seed']}" in card
    assert f"CPython {record['python']}" in card
    assert record["step"] == record["steps"]


def test_batches_visit_each_window_once_an_epoch() -> None:
    stream = torch.arange(1_000)
    epoch = [train.batch_at(stream, step, batch_size=3, window=10, seed=1) for step in range(33)]
    starts = torch.cat(epoch)[:, 0]
    assert len(starts.unique()) == len(starts) == 99
    assert len((starts % 10).unique()) == 1
    assert torch.equal(epoch[5], train.batch_at(stream, 5, batch_size=3, window=10, seed=1))
    assert not torch.equal(epoch[5], train.batch_at(stream, 5 + 33, batch_size=3, window=10, seed=1))


def test_learning_rate_warms_up_holds_and_falls() -> None:
    rates = [train.learning_rate(step, 1_000, 2.0) for step in range(1_000)]
    hold = round(1_000 * (1 - train.DECAY_SHARE))
    assert rates[0] == pytest.approx(2.0 / train.WARMUP_STEPS)
    assert rates[train.WARMUP_STEPS : hold] == [2.0] * (hold - train.WARMUP_STEPS)
    assert rates[hold - 1 :] == sorted(rates[hold - 1 :], reverse=True)
    assert rates[-1] < 1e-3
    # Until the fall begins the rate does not depend on the length of the run.
    assert rates[:hold] == [train.learning_rate(step, 5_000, 2.0) for step in range(hold)]
