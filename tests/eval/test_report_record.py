"""Run records, whole and broken, as a report reads them; and what ``quantkit eval --json`` printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_records import RECIPE, block, end, start, write_record

from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.report.measured import load_measured
from quantkit.eval.report.page import unfinished
from quantkit.eval.report.record import find_record, load_record
from quantkit.formats.writer import RUN_RECORD
from quantkit.presets import expand


def test_everything_that_a_report_shows(tmp_path: Path) -> None:
    record = load_record(write_record(tmp_path))
    assert (record.methods, record.scheme, record.block_count) == (("flatquant", "gptq"), "W4A4GC", 2)
    assert [one.index for one in record.blocks] == [0, 1]
    worst = record.layers[0]
    assert (worst.name, worst.kind, worst.block) == ("model.layers.1.mlp.down_proj", "mlp.down_proj", 1)
    assert worst.bits_per_weight == 8 * 1360 / (40 * 64)
    (change,) = record.blocks[0].changes
    assert (change.before, change.after, change.accepted) == (0.8, 0.3, True)
    assert change.learning is not None
    assert change.learning.holdout == (0.6, 0.3, None)
    assert record.end is not None
    assert record.end.warnings == ("look at block 1",)


def test_experts_are_one_kind(tmp_path: Path) -> None:
    rows = block(0, {"mlp.experts.3.down_proj": 0.1, "mlp.experts.12.down_proj": 0.2})
    kinds = {layer.kind for layer in load_record(write_record(tmp_path, start(), rows)).layers}
    assert kinds == {"mlp.experts.*.down_proj"}


def test_a_run_that_was_killed_while_it_wrote(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "my out.partial", start(), block(0), cut='{"event": "shard", "block": 1, "lay')
    assert find_record(tmp_path / "my out") == folder
    record = load_record(folder)
    assert [one.index for one in record.blocks] == [0]
    assert record.end is None
    told = unfinished(record)
    assert told.what == "This run has not come to its end: 1 of 2 blocks are done."
    assert told.command.startswith("quantkit quantize some/model --recipe recipe.yaml -o '")
    assert told.command.endswith("/my out' --resume")


def test_the_recipe_of_the_record_resumes_the_run(tmp_path: Path) -> None:
    """``--resume`` compares recipes: the one that the page shows must be the one that the run had."""
    (tmp_path / "recipe.yaml").write_text(load_record(write_record(tmp_path)).recipe)
    assert expand(tmp_path / "recipe.yaml") == RECIPE


def test_a_finished_folder_wins_over_an_unfinished_one(tmp_path: Path) -> None:
    write_record(tmp_path / "out.partial", start())
    write_record(tmp_path / "out")
    assert find_record(tmp_path / "out") == tmp_path / "out"


def test_a_block_that_was_done_twice_counts_once(tmp_path: Path) -> None:
    record = load_record(write_record(tmp_path, start(), block(0, {"a.q": 0.9}), block(0, {"a.q": 0.1}), end()))
    assert [layer.error for layer in record.layers] == [0.1]


def test_a_record_of_before_versions_were_written(tmp_path: Path) -> None:
    first = start()
    del first["record_version"], first["blocks"]
    record = load_record(write_record(tmp_path, first, block(0)))
    assert unfinished(record).what.endswith("end: 1 blocks are done.")


def without(event: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in names}


BROKEN_CURVE = {"method": "m", "learning": {"train": [], "holdout": [1.0], "best_epoch": 3}}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([start(record_version=99)], "is a record of version 99; this quantkit reads up to 1: upgrade quantkit"),
        ([block(0)], "does not begin as a run record does"),
        ([[1, 2]], "does not begin as a run record does"),
        ([without(start(), "model")], "line 1 has no 'model'; the record is damaged"),
        ([start(), without(block(0), "seconds")], "line 2 has no 'seconds'; the record is damaged"),
        ([start(), block(0), block(1, seconds="soon")], "line 3 is not as expected (could not convert"),
        ([start(), block(0, layers=[{"layer": "q", "shape": [0, 3]}])], "a weight of 0 x 3"),
        ([start(), block(0, transforms=[BROKEN_CURVE])], "best_epoch 3 of 1 losses"),
        ([start(), 7], "line 2 is not as expected"),
    ],
)
def test_broken_records_are_one_line(tmp_path: Path, events: list[Any], message: str) -> None:
    write_record(tmp_path, *events)
    with pytest.raises(QuantkitError) as caught:
        load_record(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_record_at_all(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=rf"out is no folder with a run record \({RUN_RECORD}\)"):
        find_record(tmp_path / "out")
    with pytest.raises(QuantkitError, match="has no run record"):
        find_record(tmp_path)


# --- what quantkit eval printed --------------------------------------------------------------------------------------

PERPLEXITY = {"value": 9.85, "tokens": 4080, "windows": 16, "seqlen": 256, "protocol": "one token stream"}
TASKS = {
    "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}},
    "n-shot": {"arc": 0},
    "n-samples": {"arc": {"original": 9, "effective": 8}},
    "higher_is_better": {"arc": {"acc": True}},
}
COMPARED = {
    "model": "out",
    "baseline": "some/model",
    "perplexity": {"novels": PERPLEXITY},
    "fidelity": {
        "novels": {
            "perplexity": PERPLEXITY,
            "baseline_perplexity": PERPLEXITY | {"value": 9.6},
            "bits_per_byte": 0.96,
            "baseline_bits_per_byte": 0.95,
            "divergence": {
                "kl": 0.03,
                "kl_99": 0.2,
                "top1_agreement": 0.89,
                "perplexity_ratio": {"value": 1.026, "low": 1.01, "high": 1.04},
            },
            "why_not": "",
        }
    },
    "tasks": TASKS,
    "baseline_tasks": TASKS | {"results": {"arc": {"acc,none": 0.75}}},
    "task_changes": [{"task": "arc", "metric": "acc", "value": -0.25, "low": -0.4, "high": -0.1}],
}


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_comparison_in_one_file(tmp_path: Path) -> None:
    measured = load_measured([save(tmp_path / "eval.json", COMPARED)], "some/model")
    figures = {(one.on, one.quantity): one for one in measured.figures.values()}
    perplexity = figures["novels", "perplexity"]
    assert (perplexity.before, perplexity.after) == (9.6, 9.85)
    assert perplexity.change == pytest.approx(9.85 / 9.6 - 1)
    assert perplexity.interval == pytest.approx((0.01, 0.04))
    assert figures["novels", "KL divergence (nats per token)"].after == 0.03
    task = figures["arc", "acc"]
    assert (task.before, task.after, task.change, task.interval) == (0.75, 0.5, -0.25, (-0.4, -0.1))
    assert (task.how, task.better) == ("8 documents, 0 shots", "higher")
    assert measured.models == {"before": ["some/model"], "after": ["out"]}


def test_a_model_beside_itself_with_another_cache(tmp_path: Path) -> None:
    content = COMPARED | {"model": "some/model", "kv_cache": {"format": {"method": "kivi", "bits": 2}}}
    measured = load_measured([save(tmp_path / "eval.json", content)], "some/model")
    (perplexity,) = (one for one in measured.figures.values() if one.quantity == "perplexity")
    assert (perplexity.before, perplexity.after) == (9.6, 9.85)
    assert measured.models == {"before": ["some/model"], "after": ["some/model"]}
    assert "keys and values of some/model: method kivi, bits 2." in measured.notes


def test_a_file_for_each_side(tmp_path: Path) -> None:
    before = save(tmp_path / "a.json", {"model": "some/model", "perplexity": {"novels": PERPLEXITY}})
    after = save(tmp_path / "b.json", {"model": "./out", "perplexity": {"novels": PERPLEXITY | {"value": None}}})
    (figure,) = load_measured([after, before], "some/model").figures.values()
    assert (figure.before, figure.after, figure.change) == (9.85, None, None)


def test_other_windows_are_another_quantity(tmp_path: Path) -> None:
    before = save(tmp_path / "a.json", {"model": "some/model", "perplexity": {"novels": PERPLEXITY}})
    after = save(tmp_path / "b.json", {"model": "out", "perplexity": {"novels": PERPLEXITY | {"seqlen": 512}}})
    assert [one.change for one in load_measured([before, after], "some/model").figures.values()] == [None, None]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["no json"], "cannot be read as JSON"),
        (['{"results": {}}'], "it names no model"),
        (['{"model": "out", "perplexity": {"novels": {"value": 3}}}'], "is not what `quantkit eval --json` prints"),
        (
            [
                json.dumps({"model": "out", "perplexity": {"novels": PERPLEXITY}}),
                json.dumps({"model": "out", "perplexity": {"novels": PERPLEXITY | {"value": 8.0}}}),
            ],
            "says 8.0 for perplexity on novels, another file 9.85; give one of them",
        ),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, contents: list[str], message: str) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_measured(paths, "some/model")
