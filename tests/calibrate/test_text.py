"""Every way to name a text, and every way to get it wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit import demo
from quantkit.calibrate.text import load_text
from quantkit.errors import QuantkitError, RecipeError


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "news.jsonl"
    records = [{"text": "one\u2028line", "id": 1}, {"text": "", "id": 2}, {"text": "zwei ü", "id": 3}]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", encoding="utf-8")
    return path


def test_a_txt_file_is_one_document_word_for_word(tmp_path: Path) -> None:
    path = tmp_path / "novels-test.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xbc\n")
    text = load_text(str(path))
    assert text.name == "novels-test"
    assert text.documents == ("one\n\ntwo ü\n",)  # without the byte-order mark; line ends as Python reads text


def test_jsonl_keeps_empty_documents_because_the_papers_do(jsonl: Path) -> None:
    text = load_text(str(jsonl))
    assert text.documents == ("one\u2028line", "", "zwei ü")
    assert text.joined == "one\u2028line\n\n\n\nzwei ü"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.txt").write_text("last")
    (tmp_path / "notes.md").write_text("not text to measure on")
    assert load_text(str(tmp_path)).documents == ("first", "one\u2028line", "", "zwei ü", "last")


def test_a_name_can_be_chosen(jsonl: Path) -> None:
    assert load_text(f"mine={jsonl}").name == "mine"


def test_a_file_whose_path_has_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "lr=1.txt"
    path.write_text("x")
    assert load_text(str(path)).name == "lr=1"


def test_a_local_copy_of_c4_is_cut_as_the_papers_cut_it(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text("\n".join(json.dumps({"text": str(n)}) for n in range(1200)))
    text = load_text(f"c4={path}")
    assert text.joined == " ".join(str(n) for n in range(1100))
    assert text.max_windows == 256


def test_the_demo_text_and_its_calibration_split() -> None:
    assert load_text("demo").joined == demo.heldout_text_path().read_text(encoding="utf-8")
    assert load_text("demo", split="train").joined == demo.calibration_text_path().read_text(encoding="utf-8")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["a", "b"], "n": [1, 2]}), path)
    assert load_text(str(path), column="body").documents == ("a", "b")
    with pytest.raises(RecipeError, match=r"rows\.parquet has no column 'text'; its columns: body, n\."):
        load_text(str(path))
    with pytest.raises(QuantkitError, match=r"row 0: column 'n' holds int; it must hold text"):
        load_text(str(path), column="n")
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(QuantkitError, match=r"rows\.parquet is no readable parquet file"):
        load_text(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"news\.jsonl line 2 is not JSON"),
        ('["a"]\n', r"news\.jsonl line 1 is a list; each line must be one object"),
        ('{"text": 3}\n', r"line 1: column 'text' holds int"),
        ('{"body": "a", "id": 1}\n', r"line 1 has no column 'text'; its columns: body, id\. Choose one with --column"),
        ("", r"news\.jsonl is empty"),
        ('{"text": " \\n"}\n', r"news\.jsonl is empty"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "news.jsonl"
    path.write_text(content)
    with pytest.raises(QuantkitError, match=message):
        load_text(str(path))


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(QuantkitError, match=r"old\.txt is not UTF-8: byte 0xfc at offset 1"):
        load_text(str(path))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'wikitxt2' is neither .* Did you mean 'wikitext2'\? Known: c4, demo"):
        load_text("wikitxt2")
    with pytest.raises(RecipeError, match=r"'missing\.txt' is neither a file nor a folder"):
        load_text("mine=missing.txt")
    with pytest.raises(RecipeError, match="holds no text"):
        load_text(str(tmp_path))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(RecipeError, match=r"table\.csv ends in '\.csv'; readable are \.txt, \.jsonl, \.parquet"):
        load_text(str(tmp_path / "table.csv"))


def test_wikitext2_is_joined_as_in_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: object, **options: object) -> object:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": ["", " = Title = \n", "", " body \n"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)  # stands for the hub, which no test may need
    text = load_text("wikitext2")
    assert text.joined == "\n\n = Title = \n\n\n\n\n body \n"
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"data_files": None, "split": "test"})]
    load_text("c4", split="train")
    assert asked[1][1] == {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}


def test_offline_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    # A new process: the libraries read these settings when they are imported.
    code = "from quantkit.calibrate.text import load_text; load_text('wikitext2')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=offline, cwd=Path.cwd(), capture_output=True, text=True)
    assert "QuantkitError: dataset 'wikitext2' (Salesforce/wikitext) is not in the local cache" in done.stderr
    assert "wikitext2=PATH" in done.stderr.splitlines()[-1]


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
