"""``quantkit eval`` prints what ``quantkit.eval.perplexity`` measures, and refuses nonsense before it loads a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import TEXT, make_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit.calibrate.text import load_text
from quantkit.cli.main import app
from quantkit.eval.perplexity import perplexity


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sample.txt"
    path.write_text(TEXT * 20)
    return path


def test_json_is_the_measured_number(speaking_model: Path, text: Path) -> None:
    options = ["--ppl", str(text), "--ppl", f"again={text}", "--seqlen", "32", "--max-tokens", "200", "--json"]
    done = CliRunner().invoke(app, ["eval", str(speaking_model), *options])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    model = AutoModelForCausalLM.from_pretrained(speaking_model)
    want = perplexity(model, make_tokenizer(), load_text(str(text)), seqlen=32, max_tokens=200)
    result = json.loads(done.stdout)["perplexity"]
    assert list(result) == ["sample", "again"]
    assert result["sample"] == result["again"]
    assert result["sample"]["value"] == pytest.approx(want.value, rel=1e-6)
    assert (result["sample"]["tokens"], result["sample"]["seqlen"]) == (want.tokens, 32)


def test_options_reach_the_measurement(speaking_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"body": TEXT * 30}))
    options = ["--ppl", str(path), "--column", "body", "--bos", "--batch-size", "2", "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, ["eval", str(speaking_model), *options])
    assert done.exit_code == 0, done.stderr
    heading, numbers, protocol = done.stdout.splitlines()
    assert heading.split() == ["text", "perplexity", "tokens", "seqlen"]
    assert numbers.split()[0] == "news"
    assert numbers.split()[3] == "128"
    assert protocol.startswith("news: one token stream, every window begins with BOS")


def test_a_hopeless_model_is_null_not_invalid_json(speaking_model: Path, tmp_path: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(speaking_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "hopeless")
    make_tokenizer().save_pretrained(tmp_path / "hopeless")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "hopeless"), "--ppl", str(text), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"]["sample"]["value"] is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--ppl", "TEXT", "--ppl", "sample=TEXT"], 2, "--ppl has two texts called 'sample'"),
        (["--ppl", "wikitext"], 2, "Did you mean 'wikitext2'?"),
        (["--ppl", "TEXT", "--seqlen", "500"], 2, "--seqlen 500 is more than the 128 positions"),
        (["--ppl", "TEXT", "--device", "gpu"], 2, "--device 'gpu' is no device; use auto, cpu, cuda or cuda:N"),
        (["--ppl", "TEXT", "--device", "cuda:97"], 2, "--device cuda:97 is not here"),
    ],
)
def test_bad_requests(speaking_model: Path, text: Path, arguments: list[str], status: int, message: str) -> None:
    given = [argument.replace("TEXT", str(text)) for argument in arguments]
    done = CliRunner().invoke(app, ["eval", str(speaking_model), *given])
    assert done.exit_code == status
    assert done.stderr.startswith("quantkit: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_model_without_tokenizer(tiny: Callable[..., Path], text: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(tiny("llama")), "--ppl", str(text)])
    assert done.exit_code == 1
    assert "has no tokenizer files" in done.stderr


def test_a_model_that_predicts_no_next_token(speechless_model: Path, text: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(speechless_model), "--ppl", str(text)])
    assert done.exit_code == 1
    assert re.fullmatch(
        r"quantkit: perplexity needs a causal language model.* is a BertFor(MaskedLM|SequenceClassification)\.\n",
        done.stderr,
    )
    assert done.stdout == ""
