"""``quantkit compare``: the files of its folder, one table, and the way out of every refusal."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

from quantkit.cli.main import app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("The quick brown fox jumps over the lazy dog again. " * 12)
    return path


def compare(model: Path, text: Path, out: Path, *more: object) -> Result:
    options = ["--methods", "rtn, sinq", "--schemes", "W4A16G32", "--ppl", text, "--seqlen", "16", "-o", out, *more]
    return CliRunner().invoke(app, ["compare", str(model), *map(str, options)])


def test_one_table_and_its_files(speaking_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = compare(speaking_model, text, out)
    assert done.exit_code == 0, done.stderr
    assert "3 of 3 cells are to be measured" in done.stderr
    assert "cells 3/3 sinq W4A16G32: words " in done.stderr
    heading = done.stdout.splitlines()[0]
    assert heading.split("  ")[0] == "method"
    assert "95 % interval" in heading
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:4]] == ["as it came", "rtn", "sinq"]
    assert {path.name for path in out.iterdir()} == {
        "cells.jsonl", "settings.json", "results.json", "table.md", "table.csv", "pareto.svg",
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["--seqlen"] == 16
    assert results["environment"]["torch"]
    assert [row["method"] for row in csv.DictReader((out / "table.csv").open())] == ["as it came", "rtn", "sinq"]
    assert "| sinq " in (out / "table.md").read_text()
    root = ElementTree.fromstring((out / "pareto.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = "".join(root.itertext())
    assert "stored bits per weight" in drawn
    assert all(name in drawn for name in ("rtn", "sinq", "as it came", "perplexity, words (lower is better)"))

    again = compare(speaking_model, text, out, "--json")
    assert again.stderr == ""
    assert json.loads(again.stdout) == results


def test_without_matplotlib_there_is_all_but_the_picture(
    speaking_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = compare(speaking_model, text, tmp_path / "sweep")
    assert done.exit_code == 0, done.stderr
    assert "no pareto.svg: it is drawn with matplotlib, which is not installed: pip install 'quantkit[report]'." in (
        done.stderr
    )
    assert not (tmp_path / "sweep" / "pareto.svg").exists()
    assert (tmp_path / "sweep" / "table.md").exists()


def test_refusals_say_the_way_out(speaking_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    assert compare(speaking_model, text, out, "--schemes", "A8").exit_code == 0
    done = compare(speaking_model, text, out, "--max-tokens", "64")
    assert done.exit_code == 2
    assert "--max-tokens is 64 and was not given" in done.stderr
    assert "--overwrite" in done.stderr
    done = compare(speaking_model, text, out, "--methods", " , ")
    assert done.exit_code == 2
    assert "--methods ' , ' names nothing" in done.stderr
    done = compare(speaking_model, text, out, "--limit", "3")
    assert "--limit is about tasks" in done.stderr


@pytest.mark.slow
def test_tasks_are_columns(speaking_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="tasks are lm-eval's: pip install 'quantkit[eval]'")
    data = tmp_path / "blimp"
    data.mkdir()
    pairs = [{"sentence_good": f"The {a} jumps over it.", "sentence_bad": f"The {a} it over jumps."} for a in "abcdef"]
    (data / "wh_island.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = tmp_path / "sweep"
    options = ["--methods", "rtn", "--schemes", "W2A16G32", "--tasks", "blimp_wh_island", "--limit", "4", "-o", out]
    done = CliRunner().invoke(app, ["compare", str(speaking_model), *map(str, options), "--data", str(data)])
    assert done.exit_code == 0, done.stderr
    assert "blimp_wh_island, acc" in done.stdout.splitlines()[0]
    for cell in json.loads((out / "results.json").read_text())["cells"]:
        assert 0 <= cell["tasks"]["blimp_wh_island"]["acc"]["value"] <= 1
        assert cell["tasks"]["blimp_wh_island"]["acc"]["stderr"] is not None
    assert "blimp_wh_island, acc (higher is better)" in (out / "pareto.svg").read_text()
