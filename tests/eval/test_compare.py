"""A comparison goes on where it stopped, gives the same table then, and keeps the reason of what failed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import pipeline
from quantkit.calibrate import session
from quantkit.errors import RecipeError
from quantkit.eval import compare_table
from quantkit.eval.cells import AS_IT_CAME, Bench, Cell, Measurement, read_cells
from quantkit.eval.compare import CELLS, Comparison, compare
from quantkit.eval.paired import perplexity_ratio
from quantkit.loading import load


@pytest.fixture
def wanted(source: Callable[..., Path], tmp_path: Path) -> Comparison:
    (tmp_path / "words.txt").write_text("The quick brown fox jumps over the lazy dog again. " * 12)
    measurement = Measurement({"words": str(tmp_path / "words.txt")}, seqlen=16)
    return Comparison(str(source("llama")), ("rtn", "sinq"), ("W4A16G32", "W3A16G32"), measurement)


def changed(wanted: Comparison, **changes: Any) -> Comparison:
    """``dataclasses.replace``, which also reaches into the measurement."""
    own = {name: changes.pop(name) for name in list(changes) if hasattr(wanted.measurement, name)}
    measurement = Measurement(**vars(wanted.measurement) | own)
    return Comparison(**vars(wanted) | {"measurement": measurement} | changes)


def table(cells: dict[Cell, Any]) -> tuple[str, str]:
    found = compare_table.records(cells)
    return compare_table.as_markdown(found, "tiny"), compare_table.as_csv(found)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is quantised from now on."""
    made: list[str] = []
    whole = pipeline.quantize

    def quantize(model: str, **options: Any) -> Any:
        made.append(f"{options['method']} {options['scheme']}")
        return whole(model, **options)

    monkeypatch.setattr(pipeline, "quantize", quantize)
    return made


def test_killed_and_resumed_is_the_same_table(wanted, tmp_path, monkeypatch):
    at_once = table(compare(wanted, tmp_path / "at once"))
    folder = tmp_path / "resumed"

    # Ctrl-C while the third checkpoint is measured
    figures = Measurement.figures

    def interrupted(self: Measurement, model: Any, tokenizer: Any, name: str) -> Any:
        if "rtn W3" in name:
            raise KeyboardInterrupt
        return figures(self, model, tokenizer, name)

    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "figures", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(wanted, folder)
    assert [cell.method for cell in read_cells(folder / CELLS)] == [AS_IT_CAME, "rtn", "sinq"]
    assert not (folder / "scratch").exists()

    # and a kill in the middle of a line, which leaves a checkpoint behind
    text = (folder / CELLS).read_text()
    (folder / CELLS).write_text(text[: text.rindex('"sinq"') + 20])
    (folder / "scratch" / "old").mkdir(parents=True)
    made = counted(monkeypatch)
    assert table(compare(wanted, folder)) == at_once
    assert made == ["sinq W4A16G32", "rtn W3A16G32", "sinq W3A16G32"]
    assert sorted(path.name for path in folder.iterdir()) == ["cells.jsonl", "settings.json"]
    made.clear()
    assert table(compare(wanted, folder)) == at_once
    assert not made


def test_ratios_are_to_the_model_as_it_came_on_the_same_windows(wanted, tmp_path):
    cells = compare(changed(wanted, methods=("rtn",), schemes=("W2A16G32",)), tmp_path / "out")
    before, after = cells.values()
    nll = [torch.tensor(line["texts"]["words"]["nll"]) for line in (after, before)]
    assert len(nll[0]) > 4
    baseline, found = compare_table.records(cells)
    ratio = perplexity_ratio(*nll)
    assert ratio.value != 1
    text = found["texts"]["words"]
    assert [text[part] for part in ("ratio", "low", "high")] == [round(value, 4) for value in ratio]
    assert text["perplexity"] / baseline["texts"]["words"]["perplexity"] == pytest.approx(ratio.value, rel=1e-3)
    assert baseline["texts"]["words"]["ratio"] is None


def test_what_cannot_be_is_a_cell_with_the_plans_reason_before_anything_is_quantised(wanted, tmp_path, monkeypatch):
    seen: list[list[str]] = []
    run = Bench.run

    def watched(self: Bench, job: Any) -> Any:
        lines = read_cells(tmp_path / "out" / CELLS)
        seen.append([cell.method for cell, line in lines.items() if "error" in line])
        return run(self, job)

    monkeypatch.setattr(Bench, "run", watched)
    made = counted(monkeypatch)
    cells = compare(changed(wanted, methods=("rtn", "sinq"), schemes=("W4A16G32", "A8")), tmp_path / "out")
    errors = {f"{cell.method} {cell.scheme}": line["error"] for cell, line in cells.items() if "error" in line}
    assert errors.keys() == {"rtn A8", "sinq A8"}
    assert "leaves the weights as they are; give their bits" in errors["rtn A8"]
    assert made == ["rtn W4A16G32", "sinq W4A16G32"]
    assert seen[0] == ["rtn", "sinq"]
    markdown, _ = table(cells)
    assert "failed" in markdown
    assert f"rtn A8 failed: {errors['rtn A8']}" in markdown


def test_a_bug_in_one_cell_does_not_end_the_others_and_is_tried_again(wanted, tmp_path, monkeypatch):
    wanted = changed(wanted, schemes=("W4A16G32",))
    whole = pipeline.quantize

    def quantize(model: str, **options: Any) -> Any:
        if options["method"] == "rtn":
            raise IndexError("no such\nblock")
        return whole(model, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize", quantize)
        cells = compare(wanted, tmp_path / "out")
    lines = {cell.method: line for cell, line in cells.items()}
    assert lines["rtn"]["error"] == "IndexError: no such block"
    assert lines["sinq"]["texts"]["words"]["perplexity"] > 1
    made = counted(monkeypatch)
    assert all("error" not in line for line in compare(wanted, tmp_path / "out").values())
    assert made == ["rtn W4A16G32"]


@pytest.mark.slow
def test_worker_processes_find_the_same(wanted, tmp_path):
    wanted = changed(wanted, schemes=("W4A16G32",), caches=("none", "int8"))
    alone, together = (compare(wanted, tmp_path / str(jobs), jobs=jobs, threads=1) for jobs in (1, 2))
    assert list(alone) == list(together)
    for one, other in zip(alone.values(), together.values(), strict=True):
        assert other["texts"]["words"]["nll"] == pytest.approx(one["texts"]["words"]["nll"], abs=1e-4)


def test_caches_share_one_checkpoint_and_differ(wanted, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    wanted = changed(wanted, methods=("rtn",), schemes=("W4A16G32",), caches=("none", "int8", "rotation-2bit"))
    cells = compare(wanted, tmp_path / "out")
    assert [(cell.method, cell.kv) for cell in cells] == [
        (method, kv) for method in (AS_IT_CAME, "rtn") for kv in ("none", "int8", "rotation-2bit")
    ]
    assert made == ["rtn W4A16G32"]
    perplexities = [line["texts"]["words"]["perplexity"] for line in cells.values()]
    assert len(set(perplexities)) == 6
    for own in (perplexities[:3], perplexities[3:]):  # 8 bits are close to none, 2 bits are not
        assert abs(own[1] / own[0] - 1) < 0.1 * abs(own[2] / own[0] - 1)

    found = compare_table.records(cells)
    assert [record["stream"] for record in found] == [None, True, True] * 2
    assert found[1]["read_from_codes"] == 1
    assert found[1]["bits_of_codes"] > 8 > found[2]["bits_of_codes"] > 2
    rows = list(csv.DictReader(compare_table.as_csv(found).splitlines()))
    assert [row["bits_of_codes"] for row in rows] == [str(one["bits_of_codes"] or "") for one in found]
    assert "Quantised keys and values are read as they are held when each token comes." in compare_table.notes(found)

    # a cache that was killed in the middle is measured alone
    path = tmp_path / "out" / CELLS
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "int8" not in line))
    again = compare(wanted, tmp_path / "out")
    assert list(again) == list(cells)
    assert [line["texts"] for line in again.values()] == [line["texts"] for line in cells.values()]
    assert made == ["rtn W4A16G32"] * 2


def test_the_first_cell_is_the_model_as_it_came_also_where_only_another_cache_was_asked_for(wanted):
    cells = changed(wanted, methods=("rtn",), schemes=("W4A16G32",), caches=("kivi-2bit",)).cells()
    assert [cell[1:] for cell in cells] == [
        (AS_IT_CAME, "", "none"), (AS_IT_CAME, "", "kivi-2bit"), ("rtn", "W4A16G32", "kivi-2bit"),
    ]  # fmt: skip


def test_other_settings_are_refused_and_more_methods_are_not(wanted, tmp_path, monkeypatch):
    wanted = changed(wanted, methods=("rtn",), schemes=("W4A16G32",))
    folder = tmp_path / "out"
    compare(wanted, folder)
    with pytest.raises(RecipeError, match=r"--seqlen is 8 and was 16\..* -o, or give --overwrite"):
        compare(changed(wanted, seqlen=8), folder)
    with pytest.raises(RecipeError, match="--nsamples is 3 and was 64"):
        compare(changed(wanted, flags={"calibration": {"nsamples": 3}}), folder)
    with pytest.raises(RecipeError, match="--ppl is words,other and was words"):
        compare(changed(wanted, texts={**wanted.measurement.texts, "other": wanted.measurement.texts["words"]}), folder)

    made = counted(monkeypatch)
    compare(changed(wanted, schemes=("W4A16G32", "W8A16")), folder)
    assert made == ["rtn W8A16"]

    Path(wanted.measurement.texts["words"]).write_text("Another text of the same name, and it goes on and on. " * 9)
    with pytest.raises(RecipeError, match="the content of --ppl words has changed"):
        compare(wanted, folder)
    made.clear()
    assert len(compare(wanted, folder, overwrite=True)) == 2
    assert made == ["rtn W4A16G32"]
    assert len(read_cells(folder / CELLS)) == 2


def test_a_folder_of_something_else_is_left_alone(wanted, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="is not empty and holds no comparison; name another folder"):
            compare(wanted, tmp_path / "out", overwrite=overwrite)
    with pytest.raises(RecipeError, match="is a file; name a folder"):
        compare(wanted, tmp_path / "words.txt")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"methods": ("rtm",)}, "unknown method 'rtm'"),
        ({"schemes": ("W4B4",)}, "scheme 'W4B4' cannot be read"),
        ({"caches": ("kivvi-2bit",)}, "kivi"),
        ({"texts": {}}, "nothing to measure"),
    ],
)
def test_typing_errors_show_before_the_folder_is_made(wanted, tmp_path, change, reason):
    with pytest.raises(RecipeError, match=reason):
        compare(changed(wanted, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoints_stay_where_they_are_wanted(wanted, tmp_path):
    compare(changed(wanted, methods=("rtn",), schemes=("W4A16G32",)), tmp_path / "out", keep=True)
    model, _ = load(tmp_path / "out" / "checkpoints" / "rtn-W4A16G32")
    assert model.config.quantization_config is not None


def test_markdown_csv_and_json_hold_the_same_numbers(wanted, tmp_path):
    wanted = changed(wanted, methods=("rtn",), schemes=("W3A16G32", "A8"), caches=("none", "int8"))
    found = compare_table.records(compare(wanted, tmp_path / "out"))
    heading, *rows = compare_table.cells_of_table(found)
    in_csv = list(csv.DictReader(compare_table.as_csv(found).splitlines()))
    in_json = json.loads(compare_table.as_json({"model": "tiny"}, found))["cells"]
    assert len(rows) == len(in_csv) == len(in_json) == 6
    for row, line, record in zip(rows, in_csv, in_json, strict=True):
        shown = dict(zip(heading, row, strict=True))
        assert shown["method"] == line["method"] == record["method"]
        assert shown["keys and values"] == line["kv"] == record["kv"]
        text = record["texts"].get("words")
        if text is None:
            assert shown["perplexity, words"] == "failed"
            assert line["perplexity words"] == ""
            assert line["error"] == record["error"]
            continue
        assert float(shown["perplexity, words"]) == float(line["perplexity words"]) == text["perplexity"]
        if record is not in_json[0]:
            assert float(shown["ratio"]) == float(line["ratio words"]) == text["ratio"]
            ends = [float(end) for end in shown["95 % interval"].split(" .. ")]
            assert ends == [float(line["low words"]), float(line["high words"])] == [text["low"], text["high"]]
            assert text["low"] <= text["ratio"] <= text["high"]
        if record["bits_per_weight"]:
            assert float(shown["bits per weight"]) == pytest.approx(float(line["bits_per_weight"]), abs=0.0051)
            assert float(line["bits_per_weight"]) == record["bits_per_weight"]


def test_calibration_text_is_read_once_for_all_cells(wanted, tmp_path, monkeypatch):
    made: list[int] = []
    whole = session.token_windows

    def token_windows(*args: Any, **options: Any) -> torch.Tensor:
        made.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(session, "token_windows", token_windows)
    calibration = {"source": "generated", "nsamples": 4, "seqlen": 12}
    wanted = changed(wanted, methods=("gptq", "awq"), flags={"calibration": calibration})
    cells = compare(wanted, tmp_path / "out")
    assert all("error" not in line for line in cells.values())
    assert len(made) == 1
