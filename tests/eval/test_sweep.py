"""A sweep runs every cell once, goes on where it stopped, and keeps the reason of a cell that failed."""

import json
from pathlib import Path

import pytest
import torch
import typer
import yaml
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer
from typer.testing import CliRunner

from quantkit.errors import RecipeError
from quantkit.eval import sweep, tables
from quantkit.eval.cells import AS_IT_CAME, Bench, Cell, read_cells

PLAN = {
    "models": {"tiny": "tiny", "tiny spread": {"path": "tiny", "edits": ["spread"]}},
    "texts": {"words": "words.txt"},
    "seqlen": 16,
    "tables": [{"models": ["tiny", "tiny spread"], "methods": ["rtn", "nosuch"], "schemes": ["W3A16G32"]}],
}


@pytest.fixture
def root(tmp_path) -> Path:
    save_tiny("llama", tmp_path / "tiny", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text("the cat sat on the mat and looked at the moon " * 12)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    return tmp_path


def run(root: Path) -> None:
    sweep.main(root / "plan.yaml", output=root / "out.jsonl", root=root, jobs=1)


def test_every_cell_once_and_failures_with_their_reason(root, monkeypatch):
    run(root)
    cells = read_cells(root / "out.jsonl")
    assert [cell[:3] for cell in cells] == [
        ("tiny", AS_IT_CAME, ""), ("tiny", "rtn", "W3A16G32"), ("tiny", "nosuch", "W3A16G32"),
        ("tiny spread", AS_IT_CAME, ""), ("tiny spread", "rtn", "W3A16G32"),
        ("tiny spread", "nosuch", "W3A16G32"),
    ]  # fmt: skip
    failed = cells[Cell("tiny", "nosuch", "W3A16G32")]
    assert "unknown method 'nosuch'" in failed["error"]
    measured = {model: cells[Cell(model, AS_IT_CAME, "")]["texts"]["words"] for model in PLAN["models"]}
    assert measured["tiny spread"]["perplexity"] == pytest.approx(measured["tiny"]["perplexity"], rel=1e-4)
    nll = torch.tensor(measured["tiny"]["nll"], dtype=torch.float64)
    assert float(nll.mean().exp()) == pytest.approx(measured["tiny"]["perplexity"], rel=1e-4)

    # a kill in the middle of a line: the rest is kept, the cut cell is run again
    text = (root / "out.jsonl").read_text()
    (root / "out.jsonl").write_text(text[: text.rindex("nosuch")])
    ran = []
    monkeypatch.setattr(
        Bench,
        "run",
        lambda self, job: (ran.extend(job.cells), [one.line() | {"error": "again"} for one in job.cells])[1],
    )
    run(root)
    assert ran == [Cell("tiny spread", "nosuch", "W3A16G32")]
    assert len(read_cells(root / "out.jsonl")) == 6


def test_tables_show_the_change_and_what_failed(root):
    run(root)
    app = typer.Typer()
    app.command()(tables.main)
    shown = CliRunner().invoke(app, [str(root / "out.jsonl"), "--text", "words"]).stdout
    cells = read_cells(root / "out.jsonl")
    before = cells[Cell("tiny", AS_IT_CAME, "")]["texts"]["words"]["perplexity"]
    after = cells[Cell("tiny", "rtn", "W3A16G32")]["texts"]["words"]["perplexity"]
    assert "| rtn" in shown
    assert f"{after:.2f} ({after / before - 1:+.1%})" in shown
    assert "| nosuch" in shown
    assert "failed" in shown
    with pytest.raises(RecipeError, match="'gptq' was not measured on tiny; measured: rtn, nosuch"):
        tables.model_table(cells, "tiny", "words", against="gptq")


def test_a_method_against_itself_is_no_change(root):
    run(root)
    cells = read_cells(root / "out.jsonl")
    twin = {Cell(c.model, "twin" if c.method == "rtn" else c.method, c.scheme): line for c, line in cells.items()}
    table = tables.model_table(cells | twin, "tiny", "words", against="rtn")
    assert "+0.0% [+0.0%, +0.0%]" in table


def test_plans_that_cannot_be_run(root):
    path = root / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | {"tables": [{"models": ["big"], "methods": ["rtn"], "schemes": ["W4A16"]}]}))
    with pytest.raises(RecipeError, match="model 'big' of a table is not among models"):
        sweep.load_sweep(path)
    path.write_text(json.dumps(PLAN | {"text": {}}))
    with pytest.raises(RecipeError, match=r"plan.yaml: text: Extra inputs"):
        sweep.load_sweep(path)


def test_a_variant_is_a_method_with_options(root):
    plan = PLAN | {"variants": {"searched range": {"rtn": {"clip": "mse"}}}}
    methods = ["rtn", "searched range"]
    plan["tables"] = [{"models": ["tiny"], "methods": methods, "schemes": ["W2A16G32"]}]
    (root / "plan.yaml").write_text(yaml.safe_dump(plan))
    run(root)
    cells = read_cells(root / "out.jsonl")
    plain, searched = (cells[Cell("tiny", name, "W2A16G32")]["texts"]["words"] for name in methods)
    assert "error" not in cells[Cell("tiny", "searched range", "W2A16G32")]
    assert plain["nll"] != searched["nll"]


def test_caches_are_read_as_text_is_generated_or_in_one_pass(root):
    kept = {"preset": "paper", "window": 16}
    plan = PLAN | {
        "seqlen": 32,
        "caches": {
            "stream": {"method": "nsnquant-2bit", "settings": kept},
            "one pass": {"method": "nsnquant-2bit", "settings": kept, "stream": False},
        },
        "tables": [
            {"models": ["tiny"], "caches": ["stream", "one pass", "rotation-1bit"]},
            {"models": ["tiny"], "methods": ["rtn"], "schemes": ["W4A16G32"], "caches": ["int8"]},
        ],
    }
    (root / "plan.yaml").write_text(yaml.safe_dump(plan))
    run(root)
    cells = read_cells(root / "out.jsonl")
    as_it_came = Cell("tiny", AS_IT_CAME, "")
    kvs = ["stream", "one pass", "rotation-1bit"]
    quantised = Cell("tiny", "rtn", "W4A16G32", "int8")
    both = [as_it_came._replace(kv="int8"), quantised]
    assert list(cells) == [as_it_came, *(as_it_came._replace(kv=kv) for kv in kvs), *both]
    stream, one_pass, scalar = (cells[as_it_came._replace(kv=kv)] for kv in kvs)
    assert stream["read_from_codes"] < one_pass["read_from_codes"] == scalar["read_from_codes"] == 1
    assert stream["bits_of_codes"] == one_pass["bits_of_codes"] > 2
    assert len({line["texts"]["words"]["perplexity"] for line in cells.values()}) == 6
    assert cells[quantised]["stream"] is True
    assert "bits_of_codes" not in cells[as_it_came]
