"""``quantkit eval --tasks``: BLiMP from a folder, with and without a baseline, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import VOCABULARY, make_tokenizer
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="tasks are lm-eval's: pip install 'quantkit[eval]'")

from tiny_models import save_tiny

from quantkit.cli.main import app

pytestmark = pytest.mark.slow  # importing lm-eval takes many seconds, looking for its tasks a few


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blimp")
    for name in ("wh_island", "tough_vs_raising_1"):
        lines = [
            {"sentence_good": f"The {animal} jumps over it.", "sentence_bad": f"The {animal} it over jumps."}
            for animal in ("dog", "fox", "brown dog", "lazy fox", "quick fox", "dog again")
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    save_tiny("gpt_neox", folder, vocab_size=VOCABULARY)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_as_json_with_a_text_and_saved(speaking_model: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ["--tasks", "blimp_wh_island, blimp_tough_vs_raising_1", "--num_fewshot", "0", "--limit", "4"]
    options += ["--ppl", str(tmp_path / "text.txt"), "--data", str(pairs), "--output_path", str(tmp_path / "results")]
    done = CliRunner().invoke(app, ["eval", str(speaking_model), *options, "--batch-size", "3", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["perplexity"]["text"]["value"] > 1
    tasks = found["tasks"]
    assert list(tasks["results"]) == ["blimp_wh_island", "blimp_tough_vs_raising_1"]
    assert tasks["n-samples"]["blimp_wh_island"] == {"original": 6, "effective": 4}
    assert tasks["versions"] == {"blimp_wh_island": 1.0, "blimp_tough_vs_raising_1": 1.0}
    (saved,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(saved.read_text())["results"] == tasks["results"]


def test_beside_a_baseline(speaking_model: Path, other_model: Path, pairs: Path) -> None:
    options = ["--tasks", "blimp_wh_*land", "--data", str(pairs), "--baseline", str(other_model)]
    done = CliRunner().invoke(app, ["eval", str(speaking_model), *options])
    assert done.exit_code == 0, done.stderr
    heading, numbers = done.stdout.splitlines()
    assert heading.split() == [
        "task", "metric", "value", "stderr", "documents", "shots", "baseline", "change", "95", "%", "interval"
    ]  # fmt: skip
    task, metric, value, _, documents, shots, baseline, change, low, _, high = numbers.split()
    assert (task, metric, documents, shots) == ("blimp_wh_island", "acc", "6", "0")
    assert float(change) == pytest.approx(float(value) - float(baseline), abs=1e-4)
    assert float(low) <= float(change) <= float(high)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--tasks", "blimp_wh_iland"], 2, "unknown task 'blimp_wh_iland'. Did you mean 'blimp_wh_island'"),
        (["--tasks", "blimp_wh_island", "--data", "nowhere"], 2, "--data nowhere is no folder"),
        (["--tasks", "blimp_wh_island", "--output-path", "FILE/x"], 2, "FILE/x cannot be made: Not a directory"),
    ],
)
def test_bad_requests(speaking_model: Path, tmp_path: Path, options: list[str], status: int, message: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = [option.replace("FILE", str(file)) for option in options]
    done = CliRunner().invoke(app, ["eval", str(speaking_model), *given, "--json"])
    assert done.exit_code == status
    assert message.replace("FILE", str(file)) in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
