"""``quantkit report`` on a real run, one that died, and requests that cannot be met; pictures through ``inspect``."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_records import Page, block, start, write_record
from safetensors.torch import load_file
from tiny_tokenizer import TEXT
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.eval.report.record import load_record
from quantkit.eval.report.weights import weight_pictures
from quantkit.formats.layer import from_tensors
from quantkit.formats.writer import RUN_RECORD

CALIBRATION = {"nsamples": 6, "seqlen": 24, "batch_size": 6}
RECIPE = {
    "scheme": "W4A4",
    "steps": [{"method": "flatquant", "options": {"epochs": 1}}, "gptq"],
    "calibration": CALIBRATION,
}


@pytest.fixture(scope="module")
def quantised(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    quantkit.quantize(str(source("llama")), output=output, recipe=RECIPE)
    return output


@pytest.fixture
def no_histograms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else that is looked at here."""
    monkeypatch.setattr("quantkit.cli.report.HISTOGRAMS", 0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sample.txt"
    path.write_text(TEXT * 20)
    return path


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_the_report_of_a_run(quantised: Path) -> None:
    done = run("report", quantised)
    assert (done.exit_code, done.stdout) == (0, f"{quantised / 'report.html'}\n")
    page = Page((quantised / "report.html").read_text())
    record = load_record(quantised)
    assert page.column("layer") == [layer.name for layer in record.layers]
    assert len(page.column("layer")) == 14
    assert record.block_count == 2
    assert {"Learning curve of flatquant in block 1", "Time per block"} <= set(page.attributes("aria-label"))
    assert f"Weights of {record.layers[0].name}" in page.attributes("aria-label")
    assert "output loss" in page.text  # what GPTQ wrote


def test_histograms_are_of_the_stored_weights(quantised: Path) -> None:
    layer = load_record(quantised).layers[0]
    (found,) = weight_pictures(quantised, [layer])
    tensors = load_file(quantised / "model.safetensors")
    own = {name.removeprefix(f"{layer.stored}."): t for name, t in tensors.items() if name.startswith(layer.stored)}
    weight, _ = from_tensors(own, layer.format)
    values = weight.dequantize()
    assert found.codes.tolist() == pytest.approx([float((weight.codes == code).double().mean()) for code in range(16)])
    assert float(found.values.sum()) == pytest.approx(1)
    assert float(found.edges[-1]) == float(values.abs().max())
    middle = (values >= found.edges[30]) & (values < found.edges[51])
    assert float(found.values[30:51].sum()) == pytest.approx(float(middle.double().mean()), abs=1e-3)


@pytest.mark.usefixtures("no_histograms")
def test_pictures_before_and_after(quantised: Path, source: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    page = tmp_path / "pictures.html"
    done = run(
        "report", quantised, "--text", text, "--baseline", source("llama"), "--layers", "*.1.mlp.*", "--tokens", 60,
        "-o", page,
    )  # fmt: skip
    assert (done.exit_code, done.stdout) == (0, f"{page}\n"), done.stderr
    shown = Page(page.read_text())
    labels = set(shown.attributes("aria-label"))
    for side in ("before", "after"):
        assert f"Inputs of model.layers.1.mlp.down_proj by token and channel, {side}" in labels
    assert shown.column("linear") == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]
    (row,) = (row for row in shown.rows if row[0] == "model.layers.1.mlp.down_proj" and len(row) == 8)
    assert all(row[1:]), "every quantity has a number on either side"
    assert not (quantised / "pictures.html").exists()


@pytest.mark.usefixtures("no_histograms")
def test_what_eval_printed_goes_in(quantised: Path, source: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    measure = ["--ppl", text, "--seqlen", 32, "--max-tokens", 100, "--prompts", 0, "--json"]
    printed = run("eval", quantised, "--baseline", source("llama"), *measure).stdout
    (tmp_path / "eval.json").write_text(printed)
    page = tmp_path / "page.html"
    done = run("report", quantised, "--eval", tmp_path / "eval.json", "--output", page)
    assert done.exit_code == 0, done.stderr
    found = json.loads(printed)["fidelity"]["sample"]
    (row,) = (row for row in Page(page.read_text()).rows if row[0] == "sample: perplexity")
    assert row[1:3] == [f"{found[side]['value']:.5g}" for side in ("baseline_perplexity", "perplexity")]


@pytest.mark.usefixtures("no_histograms")
def test_eval_writes_it_by_itself(quantised: Path, source: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    measure = ["--ppl", text, "--seqlen", 32, "--max-tokens", 100, "--prompts", 0, "--report", tmp_path / "page.html"]
    done = run("eval", quantised, "--baseline", source("llama"), *measure, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["fidelity"]["sample"]
    page = Page((tmp_path / "page.html").read_text())
    (row,) = (row for row in page.rows if row[0] == "sample: perplexity")
    assert row[1:3] == [f"{found[side]['value']:.5g}" for side in ("baseline_perplexity", "perplexity")]
    assert page.column("layer") == [layer.name for layer in load_record(quantised).layers]

    done = run("eval", source("llama"), *measure)  # there is no run that made it
    assert done.exit_code == 0, done.stderr
    assert f"the report is {tmp_path / 'page.html'}" in done.stderr
    page = Page((tmp_path / "page.html").read_text())
    (row,) = (row for row in page.rows if row[0] == "sample: perplexity")
    assert row[1:3] == ["", f"{found['baseline_perplexity']['value']:.5g}"]
    assert "layer" not in page.text

    for wrong, why in ((tmp_path, "is a folder"), (tmp_path / "no" / "page.html", "is in no folder")):
        done = run("eval", "demo", "--ppl", "demo", "--report", wrong)
        assert (done.exit_code, done.stderr) == (2, f"quantkit: --report {wrong} {why}; name a file.\n")


def test_a_run_that_died(tmp_path: Path) -> None:
    write_record(tmp_path / "out.partial", start(), block(0, transforms=[]), cut='{"event": "shard", "blo')
    done = run("report", tmp_path / "out")
    page = tmp_path / "out.report.html"
    assert (done.exit_code, done.stdout) == (0, f"{page}: the run is unfinished, 1 blocks are done\n")
    assert "--resume" in page.read_text()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [RUN_RECORD]
    assert run("report", tmp_path / "out.partial").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["EMPTY"], 1, "has no run record (quantkit-run.jsonl)"),
        (["DEAD", "--text", "demo"], 2, "is unfinished, so there is no model to look at"),
        (["DEAD", "--layers", "*"], 2, "--layers is about activations"),
        (["DEAD", "--eval", "nowhere.json"], 2, "--eval nowhere.json cannot be read as JSON"),
        (["DEAD", "--output", "EMPTY/no/such.html"], 1, "cannot write"),
        (["NEWER"], 1, "is a record of version 2; this quantkit reads up to 1: upgrade quantkit."),
    ],
)
def test_bad_requests(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "DEAD": tmp_path / "dead", "NEWER": tmp_path / "newer"}
    write_record(tmp_path / "dead.partial", start())
    write_record(tmp_path / "newer", start(record_version=2))
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    done = run("report", *arguments)
    assert done.exit_code == status
    assert message in done.stderr
    assert done.stderr.startswith("quantkit: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_checkpoint_that_is_not_of_its_record(quantised: Path, tmp_path: Path) -> None:
    record = (quantised / RUN_RECORD).read_text().replace("layers.0.mlp.", "layers.7.mlp.")
    (tmp_path / RUN_RECORD).write_text(record)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(quantised / name)
    layers = [layer for layer in load_record(tmp_path).layers if ".7." in layer.name]
    with pytest.raises(quantkit.QuantkitError, match="of which its run record tells"):
        weight_pictures(tmp_path, layers)


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_without_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain = builtins.__import__

    def without(module: str, *rest: Any, **named: Any) -> Any:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return plain(module, *rest, **named)

    write_record(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    done = run("report", tmp_path)
    assert done.exit_code == 1
    assert f"{name}, which is not installed: pip install 'quantkit[report]'." in done.stderr


@pytest.mark.parametrize("kind", ["float", "quantised"])
def test_activations_of_any_model(
    quantised: Path, source: Callable[..., Path], text: Path, tmp_path: Path, kind: str
) -> None:
    model, page = {"float": source("llama"), "quantised": quantised}[kind], tmp_path / "flatness.html"
    options = ["--text", text, "--tokens", 60, "--layers", "*.0.mlp.down_proj"]
    done = run("inspect", model, "--activations", *options, "--report", page)
    assert done.exit_code == 0, done.stderr
    heading, numbers, _, last = done.stdout.splitlines()
    assert heading.split() == ["linear", "channels", "rms", "peak", "crest", "rounding", "error"]
    assert numbers.split()[:2] == ["model.layers.0.mlp.down_proj", "104"]
    assert (numbers.split()[-1] == "-") == (kind == "float")
    assert last == str(page)
    shown = Page(page.read_text())
    assert sum(tag == "svg" for tag, _ in shown.elements) == 2
    assert run("inspect", model, "--activations", *options).stdout == done.stdout.removesuffix(f"{page}\n")


def test_options_of_activations_alone(quantised: Path) -> None:
    assert "goes with --activations" in run("inspect", quantised, "--report", "x.html").stderr
    assert run("inspect", quantised, "--layers", "*").exit_code == 2


def test_another_baseline(quantised: Path, source: Callable[..., Path], text: Path) -> None:
    done = run("report", quantised, "--text", text, "--baseline", source("gpt_neox"), "--tokens", 40)
    assert done.exit_code == 2
    assert "has none of the linears of" in done.stderr
