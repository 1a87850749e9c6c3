"""What is learned about a block is learned with its keys and values rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from looked import CALIBRATION, save_source

import quantkit
from quantkit.formats.writer import RUN_RECORD, read_record

OPTIONS = {"epochs": 2, "holdout": 0.25, "target": "quantised"}


def losses(folder: Path) -> list[dict[str, Any]]:
    events = [event for event in read_record(folder / RUN_RECORD) if "block" in event]
    return [next(fact for fact in event["transforms"] if "loss_before" in fact) for event in events]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rounded_keys_and_values_are_part_of_the_error_that_is_learned_away(tmp_path: Path, name: str) -> None:
    found = {}
    for kv in ("", "KV2"):
        recipe = {
            "scheme": f"W8A8{kv}",
            "steps": [{"method": "omniquant", "options": OPTIONS}, "rtn"],
            "calibration": CALIBRATION,
        }
        quantkit.quantize(str(save_source(name, tmp_path)), output=tmp_path / f"out{kv}", recipe=recipe)
        found[kv] = losses(tmp_path / f"out{kv}")
    for plain, rounded in zip(found[""], found["KV2"], strict=True):
        assert rounded["loss_before"] > 3 * plain["loss_before"]
        assert rounded["loss"] <= rounded["loss_before"]
    assert any(fact["accepted"] for fact in found["KV2"])
