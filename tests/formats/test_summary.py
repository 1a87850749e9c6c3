"""What a run record is boiled down to."""

import re

import pytest
from looked import CALIBRATION

import quantkit
from quantkit.formats.summary import block_rows, summarise
from quantkit.formats.writer import RUN_RECORD, read_record


def layer(error, damping=0.01, fallback=None):
    return {"layer": f"l{error}", "error": error, "loss": 1.0, "damping": damping, "fallback": fallback}


def site(before, after, low, high):
    return {
        "method": "os-plus", "site": "x", "loss_before": before, "loss": after, "scale_min": low, "scale_max": high,
    }  # fmt: skip


RECORD = [
    {"event": "begin"},
    {"event": "shard", "block": 1, "seconds": 5.0, "peak_rss_bytes": 3_000_000,
     "layers": [layer(0.3, None, "no tokens")],
     "transforms": [site(0.5, 0.5, 1.0, 1.0)],
     "tuning": {"method": "norm-tweaking", "loss_before": 2.0, "loss": 2.0, "accepted": False}},
    {"event": "shard", "block": 0, "seconds": 2.0, "peak_rss_bytes": 2_000_000,
     "layers": [layer(0.1), layer(0.2, 0.04)],
     "transforms": [site(0.4, 0.1, 0.5, 8.0), site(0.2, 0.1, 1.0, 2.0)],
     "tuning": {"method": "norm-tweaking", "loss_before": 2.0, "loss": 1.0, "accepted": True}},
]  # fmt: skip


def test_a_line_for_each_method():
    assert summarise(RECORD) == [
        "os-plus: 2 of 3 places changed, error of the quantised output 0.4 -> 0.1 (median), scales 0.5 to 8",
        "rounding: 2 linears by their Hessian, damping 0.01 to 0.04; 1 to nearest, the first l0.3: no tokens",
        "norm-tweaking: kept in 1 of 2 blocks, hold-out loss 2 -> 1.5 (median)",
        "blocks: 3.5 s each (median), slowest 1 with 5.0 s",
    ]


def test_a_row_for_each_block_in_model_order():
    heads, rows = block_rows(RECORD)
    assert heads[:2] == ["block", "seconds"]
    assert rows == [
        ["0", "2.0", "2 MB", "15.00%", "0.3 -> 0.1", "kept, 2 -> 1"],
        ["1", "5.0", "3 MB", "30.00%", "0.5 -> 0.5", "reverted, 2 -> 2"],
    ]


def test_a_run_without_data_says_little_and_an_empty_record_nothing():
    plain = {
        "event": "shard",
        "block": 0,
        "seconds": 1.0,
        "peak_rss_bytes": 1,
        "layers": [{"layer": "a", "error": 0.1}],
    }
    assert summarise([plain]) == ["blocks: 1.0 s each (median), slowest 0 with 1.0 s"]
    assert summarise([{"event": "begin"}]) == []


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (["rtn", "norm-tweaking"], r"norm-tweaking: kept in \d of 2 blocks, hold-out loss \S+ -> \S+ \(median\)"),
        (
            [{"method": "omniquant", "options": {"epochs": 1, "let": "always"}}, "rtn"],
            r"omniquant: kept in \d of 2 blocks, hold-out loss \S+ -> \S+ \(median\), scales \S+ to \S+",
        ),
        (
            ["os-plus", "rtn"],
            r"os-plus: \d+ of \d+ places changed, error of the quantised output .*, scales \S+ to \S+",
        ),
    ],
)
def test_methods_write_what_is_summed_up(source, tmp_path, steps, line):
    recipe = {"scheme": "W3A8", "steps": steps, "calibration": CALIBRATION}
    quantkit.quantize(str(source("llama")), output=tmp_path / "out", recipe=recipe)
    record = read_record(tmp_path / "out" / RUN_RECORD)
    assert any(re.fullmatch(line, found) for found in summarise(record)), summarise(record)
