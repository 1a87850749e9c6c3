"""Blocks solved ahead in worker processes give the checkpoint that one process alone makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from looked import CALIBRATION, save_source

import quantkit
from quantkit.errors import RecipeError
from quantkit.formats import writer
from quantkit.formats.writer import read_record

LEARNED = {
    "method": "omniquant",
    "options": {"inputs": "float", "target": "float", "epochs": 2, "holdout": 0.25, "let": "always"},
}
RECIPE = {"scheme": "W3A16G32", "calibration": CALIBRATION}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source("llama", tmp_path)


def tensors(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_as_many_workers_as_you_like_and_the_same_bytes(source: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = RECIPE | {"steps": [LEARNED, "rtn"]}
    for name, workers in (("here", None), ("one", 1), ("two", 2)):
        quantkit.quantize(str(source), output=tmp_path / name, recipe=recipe, block_parallel=workers)
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two") == tensors(tmp_path / "here")
    facts = [
        [event["transforms"] for event in read_record(tmp_path / name / writer.RUN_RECORD) if "transforms" in event]
        for name in ("here", "two")
    ]
    assert facts[0] == facts[1]
    assert any(fact.get("accepted") for rows in facts[0] for fact in rows)


def test_goes_on_behind_the_blocks_that_are_done(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"recipe": RECIPE | {"steps": [LEARNED, "gptq"]}, "block_parallel": 1}
    quantkit.quantize(str(source), output=tmp_path / "whole", **settings)
    write = writer.CheckpointWriter.write_shard

    def stop(self: writer.CheckpointWriter, key: str, *rest: Any) -> None:
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(source), output=tmp_path / "out", **settings)
    monkeypatch.undo()
    quantkit.quantize(str(source), output=tmp_path / "out", resume=True, **settings)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")


@pytest.mark.parametrize(
    ("steps", "workers", "words"),
    [
        (["rtn"], 2, "needs a transform that learns"),
        ([{"method": "omniquant", "options": {"target": "float"}}, "rtn"], 2, "omniquant looks at what the quantised"),
        (["awq", LEARNED, "rtn"], 2, "awq looks at what the quantised"),
        ([LEARNED, "rtn"], 0, "at least 1"),
    ],
)
def test_blocks_that_wait_for_each_other_are_refused(
    source: Path, tmp_path: Path, steps: list[Any], workers: int, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        quantkit.quantize(
            str(source), output=tmp_path / "out", recipe=RECIPE | {"steps": steps}, block_parallel=workers
        )
    assert not (tmp_path / "out").exists()
