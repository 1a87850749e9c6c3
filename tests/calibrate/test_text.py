"""What calibration adds to the ways of naming a text; the others are in tests/eval/test_text.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.calibrate.text import load_text
from quantkit.errors import QuantkitError, RecipeError

CHAT = [{"role": "user", "content": "hello"}]


def render(turns: list[dict[str, Any]]) -> str:
    return "|".join(f"{turn['role']}={turn['content']}" for turn in turns)


def test_conversations_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    assert load_text(str(path), chat=render).documents == ("user=hello",)
    with pytest.raises(QuantkitError, match="column 'messages' holds a conversation, which only calibration can use"):
        load_text(str(path))


def test_text_is_preferred_to_messages(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "text": "plain"}))
    assert load_text(str(path), chat=render).documents == ("plain",)
    assert load_text(str(path), column="messages", chat=render).documents == ("user=hello",)


def test_parquet_conversations(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "chat.parquet"
    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), path)
    assert load_text(str(path), chat=render).documents == ("user=hello", "user=hello")


def test_a_set_to_calibrate_on_only() -> None:
    with pytest.raises(RecipeError, match="'pile-val' is text to calibrate on; measure on another one"):
        load_text("pile-val", split="test")


class Rows:
    """As much of a hub dataset as is used."""

    def __init__(self, column: str, values: list[Any]) -> None:
        self.column, self.values = column, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, column: str) -> list[Any]:
        assert column == self.column
        return self.values

    def select(self, rows: range) -> Rows:
        return Rows(self.column, [self.values[row] for row in rows])


@pytest.mark.parametrize(
    ("name", "path", "split", "column", "value"),
    [
        ("pile-val", "mit-han-lab/pile-val-backup", "validation", "text", "words"),
        ("ultrachat", "HuggingFaceH4/ultrachat_200k", "train_sft", "messages", CHAT),
    ],
)
def test_hub_sets(name: str, path: str, split: str, column: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> Rows:
        asked.append((args, options))
        return Rows(column, [value] * 2005)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # stands for the hub
    text = load_text(name, split="train", chat=render)
    assert asked == [((path, None), {"data_files": None, "split": split})]
    assert text.documents == (("words" if name == "pile-val" else "user=hello"),) * 2000
