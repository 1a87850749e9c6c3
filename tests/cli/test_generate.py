"""``quantkit generate`` says what ``model.generate`` says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit.cli.main import app

PROMPT = "The quick brown"


def run(model: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", str(model), *arguments])


def test_greedy_text_is_the_models(speaking_model: Path) -> None:
    done = run(speaking_model, PROMPT, "--max-new-tokens", "12", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    tokenizer = make_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(speaking_model).eval()
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert result["text"] == tokenizer.decode(ids[0, -12:])
    assert (result["tokens"], result["prompt"]) == (12, PROMPT)


def test_text_is_shown_with_its_prompt_and_speed_goes_to_stderr(speaking_model: Path) -> None:
    shown = run(speaking_model, PROMPT, "--max-new-tokens", "12")
    want = json.loads(run(speaking_model, PROMPT, "--max-new-tokens", "12", "--json").stdout)["text"]
    assert shown.stdout == f"{PROMPT}{want}\n"
    assert "12 tokens, " in shown.stderr


def test_sampling_follows_its_seed(speaking_model: Path) -> None:
    def sample(seed: str) -> str:
        done = run(speaking_model, PROMPT, "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "20", "--json")
        return str(json.loads(done.stdout)["text"])

    assert sample("3") == sample("3") != sample("4")


def test_chat_uses_the_models_template(speaking_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(speaking_model, folder)
    template = "{% for m in messages %}The quick {{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    plain = json.loads(run(speaking_model, PROMPT, "--json").stdout)["text"]
    chat = run(folder, "brown", "--chat", "--json")
    assert json.loads(chat.stdout)["text"] == plain
    assert run(folder, "brown", "--chat").stdout == f"{plain}\n"  # without the template's own text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPT, "--max-new-tokens", "200"], "--max-new-tokens 200 do not fit the model's 128 positions; use"),
        (["", "--max-new-tokens", "5"], "the prompt is empty"),
        ([PROMPT, "--chat"], "the model has no chat template"),
    ],
)
def test_bad_requests(speaking_model: Path, arguments: list[str], message: str) -> None:
    done = run(speaking_model, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_predicts_no_next_token(speechless_model: Path) -> None:
    done = run(speechless_model, PROMPT)
    assert done.exit_code == 1
    assert re.fullmatch(
        r"quantkit: generating text needs a causal language model.* is a BertFor(MaskedLM|SequenceClassification)\.\n",
        done.stderr,
    )
    assert done.stdout == ""


def test_a_cache_for_a_float_model(speaking_model: Path) -> None:
    done = run(speaking_model, PROMPT, "--max-new-tokens", "12", "--kv", "rotation-4bit", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == 12
    assert found["kv_cache"]["format"] == {"method": "rotation", "bits": 4, "gain": "unbiased", "seed": 0}
    assert found["kv_cache"]["bits_per_element"] < 6
    said = run(speaking_model, PROMPT, "--max-new-tokens", "12", "--kv", "kv8").stderr
    assert "bits per element; 8-bit codes, a step and a zero point per token and head" in said
    plain = json.loads(run(speaking_model, PROMPT, "--max-new-tokens", "12", "--json").stdout)
    assert json.loads(
        run(speaking_model, PROMPT, "--max-new-tokens", "12", "--kv", "none", "--json").stdout
    ).keys() == (plain.keys())


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_unknown_caches(speaking_model: Path, command: str) -> None:
    rest = [PROMPT] if command == "generate" else ["--ppl", "demo"]
    done = CliRunner().invoke(app, [command, str(speaking_model), *rest, "--kv", "rotation-2bt"])
    assert done.exit_code == 2
    assert "unknown cache method 'rotation-2bt'. Did you mean 'rotation-2bit'?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_without_a_cache(speechless_model: Path) -> None:
    done = run(speechless_model, PROMPT, "--kv", "kivi-2bit")
    assert done.exit_code == 1
    assert "does not predict the next token, so it has no cache" in done.stderr
