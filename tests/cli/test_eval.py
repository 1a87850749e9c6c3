"""``quantkit eval`` prints what ``quantkit.eval.perplexity`` measures, and refuses nonsense before it loads a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import TEXT, make_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit.calibrate.text import load_text
from quantkit.cli.main import app
from quantkit.eval.fidelity import fidelity
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


def test_how_a_cache_is_read_is_said(speaking_model: Path, text: Path) -> None:
    """Of 128 tokens only the last one reads codes of kivi, and it predicts nothing; in one pass all of them do."""

    def measured(*more: str) -> dict[str, Any]:
        options = ["--ppl", str(text), "--seqlen", "128", "--max-tokens", "256", "--json", *more]
        done = CliRunner().invoke(app, ["eval", str(speaking_model), *options])
        assert done.exit_code == 0, done.stderr
        return dict(json.loads(done.stdout))

    plain, stream = measured(), measured("--kv", "kivi-2bit")
    one_pass = measured("--kv", "kivi-2bit", "--no-kv-stream")
    values = [one["perplexity"]["sample"]["value"] for one in (plain, stream, one_pass)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] != pytest.approx(values[0], rel=1e-6)
    assert "kv_read" not in plain
    assert stream["kv_read"] == {
        "how": "keys and values are read as they are held when each token comes",
        "read_from_codes": pytest.approx(64 / 8256, abs=1e-4),  # of keys; the values of these are the newest
        "stream": True,
    }
    assert one_pass["kv_read"]["stream"] is False
    assert one_pass["kv_read"]["read_from_codes"] == 0.5
    options = ["--ppl", str(text), "--seqlen", "128", "--max-tokens", "256", "--kv", "kivi-2bit"]
    shown = CliRunner().invoke(app, ["eval", str(speaking_model), *options]).stdout.splitlines()
    assert shown[2].endswith("; keys and values are read as they are held when each token comes")
    assert shown[-1] == "0.8 % of the keys and values that tokens read are codes"


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
        ([], 2, "nothing to measure"),
        (["--baseline", "demo"], 2, "give --ppl TEXT (demo, wikitext2, a file), --tasks NAMES or both"),
        (["--ppl", "TEXT", "--num_fewshot", "2"], 2, "--num-fewshot is about tasks, of which there are none"),
        (["--ppl", "TEXT", "--log-samples"], 2, "--log-samples is about tasks"),
        (["--ppl", "TEXT", "--batch-size", "auto:4"], 2, "--batch-size auto:4 is neither a number from 1 on nor auto"),
        (["--ppl", "TEXT", "--batch_size", "0"], 2, "--batch-size 0 is neither"),
        (["--ppl", "TEXT", "--baseline", "nowhere/at/all"], 1, "nowhere/at/all"),
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


@pytest.fixture
def coarse(speaking_model: Path, tmp_path: Path) -> Path:
    """The model with its blocks' weights rounded to multiples of 1/8."""
    model = AutoModelForCausalLM.from_pretrained(speaking_model)
    with torch.no_grad():
        for tensor in model.model.layers.parameters():
            tensor.mul_(8).round_().div_(8)
    model.save_pretrained(tmp_path / "coarse")
    make_tokenizer().save_pretrained(tmp_path / "coarse")
    return tmp_path / "coarse"


def test_a_baseline_beside_it(speaking_model: Path, coarse: Path, text: Path) -> None:
    options = ["--ppl", str(text), "--baseline", str(speaking_model), "--seqlen", "32", "--prompts", "2"]
    done = CliRunner().invoke(app, ["eval", str(coarse), *options, "--json"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    model, baseline = (AutoModelForCausalLM.from_pretrained(folder) for folder in (coarse, speaking_model))
    want = fidelity(
        model, make_tokenizer(), baseline, make_tokenizer(), load_text(str(text)), seqlen=32, prompts=2
    ).divergence
    assert want is not None
    got = result["fidelity"]["sample"]
    assert result["baseline"] == str(speaking_model)
    assert got["divergence"]["kl"] == pytest.approx(want.kl, rel=1e-6)
    assert got["divergence"]["top1_agreement"] == want.top1_agreement < 1
    assert got["divergence"]["perplexity_ratio"] == pytest.approx(want.perplexity_ratio._asdict(), rel=1e-6)
    assert got["divergence"]["generation"]["prompts"] == 2
    assert [one["text"] for one in got["divergence"]["worst"]] == [one.text for one in want.worst]
    assert got["perplexity"] == result["perplexity"]["sample"]

    shown = CliRunner().invoke(app, ["eval", str(coarse), *options])
    heading, numbers, *lines = shown.stdout.splitlines()
    assert heading.split()[:4] == ["text", "perplexity", "baseline", "ratio"]
    assert numbers.split()[3] == f"{want.perplexity_ratio.value:.4f}"
    assert f"{want.top1_agreement:.2%}" in numbers
    assert f"sample: KL(baseline || model) {want.kl:.3g} nats per token" in shown.stdout
    assert "of 2 throughout" in shown.stdout
    assert sum(line.startswith("sample: window ") for line in lines) == 3


def test_a_baseline_with_other_tokens(speaking_model: Path, text: Path) -> None:
    done = CliRunner().invoke(
        app, ["eval", str(speaking_model), "--ppl", str(text), "--baseline", "demo", "--max-tokens", "300"]
    )
    assert done.exit_code == 0, done.stderr
    assert re.search(r"sample: [\d.]+ bits per byte, baseline [\d.]+\n", done.stdout)
    assert "sample: no KL divergence, because the model's tokenizer has 320 tokens and the baseline's" in done.stdout


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
