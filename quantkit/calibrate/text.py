"""Text to measure or calibrate on: local files, the demo text, or the hub datasets of the papers.

Which documents, in which order and with what between them decides the number, so it is fixed here:
WikiText-2 is the raw test split joined by blank lines and C4 the first 1100 documents of the first validation shard
joined by spaces, cut to 256 windows, both as in the code of GPTQ (Frantar et al., arXiv 2210.17323). The Pile's
validation split is what the code of AWQ calibrates on (Lin et al., arXiv 2306.00978).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import QuantkitError, RecipeError, did_you_mean

Split = Literal["test", "train"]
Chat = Callable[[list[dict[str, Any]]], str]
"""Conversation, a list of {role, content} -> text; a ``ValueError`` says what is wrong with it."""

FILE_TYPES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Text:
    """Documents and how they become one stream."""

    name: str
    documents: tuple[str, ...]
    separator: str = "\n\n"
    max_windows: int | None = None
    """The papers measure this dataset on so many windows; None: on all of it."""

    @property
    def joined(self) -> str:
        return self.separator.join(self.documents)


@dataclass(frozen=True)
class _HubDataset:
    path: str
    config: str | None
    files: dict[Split, str] | None = None
    """Files of the repository to read instead of a config's, one per split."""
    separator: str = "\n\n"
    documents: int | None = None
    max_windows: int | None = None
    column: str = "text"
    splits: dict[Split, str] = field(default_factory=lambda: {"test": "test", "train": "train"})
    """What the dataset calls its splits; one that is not there has not been published."""


HUB = {
    "wikitext2": _HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": _HubDataset(
        "allenai/c4",
        None,
        {"test": "en/c4-validation.00000-of-00008.json.gz", "train": "en/c4-train.00000-of-01024.json.gz"},
        separator=" ",
        documents=1100,
        max_windows=256,
    ),
    "pile-val": _HubDataset("mit-han-lab/pile-val-backup", None, documents=2000, splits={"train": "validation"}),
    "ultrachat": _HubDataset(
        "HuggingFaceH4/ultrachat_200k",
        None,
        documents=2000,
        column="messages",
        splits={"test": "test_sft", "train": "train_sft"},
    ),
}


def load_text(source: str, *, split: Split = "test", column: str | None = None, chat: Chat | None = None) -> Text:
    """Read the text that ``source`` names.

    Args:
        source: ``demo``, the name of a hub dataset (``HUB``), a .txt, .jsonl or .parquet file, a folder of those, or
            ``NAME=PATH`` to call a local file ``NAME`` in the results (default: the file's name without its ending);
            called by the name of a hub dataset, it is joined and cut as that one.
        split: ``test`` to measure on, ``train`` to calibrate on; files have no splits and ignore it.
        column: the field of .jsonl and .parquet files that holds the text or the conversation; default: ``text``, or
            ``messages`` in a file that has this one only.
        chat: turns a conversation into text; None: conversations are refused.

    Raises:
        RecipeError: ``source`` is neither a known name nor a file that can be read, or ``column`` is not in it.
        QuantkitError: the file is empty or damaged, or the hub cannot be reached.
    """
    if source == "demo":
        from quantkit import demo

        path = demo.heldout_text_path() if split == "test" else demo.calibration_text_path()
        return Text("demo", tuple(_read(path, column, chat)))
    if source in HUB:
        return _from_hub(source, split, chat)
    name, path = _local(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FILE_TYPES)
    if not files:
        raise RecipeError(f"folder {path} holds no text; put {', '.join(FILE_TYPES)} files there.")
    documents = [document for file in files for document in _read(file, column, chat)]
    if not any(document.strip() for document in documents):
        raise QuantkitError(f"{path} is empty: there is no text to use; give a file with text in it.")
    return _as_in_the_papers(name, documents)


def _as_in_the_papers(name: str, documents: list[str]) -> Text:
    """A local copy that is called ``wikitext2`` or ``c4`` gives the number that the hub's would."""
    rules = HUB.get(name)
    if rules is None:
        return Text(name, tuple(documents))
    return Text(name, tuple(documents[: rules.documents]), rules.separator, rules.max_windows)


def _local(source: str) -> tuple[str, Path]:
    """(name, path) of ``PATH`` or ``NAME=PATH``; the path exists."""
    name, equals, rest = source.partition("=")
    if Path(source).exists() or not equals:
        name, rest = "", source
    path = Path(rest).expanduser()
    if not path.exists():
        known = did_you_mean(rest, ["demo", *HUB])
        raise RecipeError(f"text '{rest}' is neither a file nor a folder nor a known dataset. {known}")
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise RecipeError(f"text file {path} ends in '{path.suffix}'; readable are {', '.join(FILE_TYPES)}.")
    return name or path.resolve().stem, path


def _read(path: Path, column: str | None, chat: Chat | None) -> list[str]:
    """The documents of one file: a .txt file is one."""
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, column, chat)
        text = path.read_text(encoding="utf-8-sig")  # line ends become \n, as wherever Python reads text
    except UnicodeDecodeError as error:
        raise QuantkitError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it, "
            f"for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from None
    except OSError as error:
        raise QuantkitError(f"{path} cannot be read: {error.strerror or error}.") from None
    return _parse_jsonl(path, text, column, chat) if path.suffix == ".jsonl" else [text]


def _parse_jsonl(path: Path, text: str, column: str | None, chat: Chat | None) -> list[str]:
    documents = []
    # Not splitlines(): that also breaks at U+2028 and the like, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise QuantkitError(
                f"{path} line {number} is not JSON: {error.msg}; each line must be one object."
            ) from None
        if not isinstance(record, dict):
            raise QuantkitError(f"{path} line {number} is a {type(record).__name__}; each line must be one object.")
        where = f"{path} line {number}"
        name = _column(where, column, list(record))
        documents.append(_document(record[name], name, where, chat))
    return documents


def _column(where: str, wanted: str | None, columns: list[str]) -> str:
    """The column to read."""
    name = wanted or ("messages" if "messages" in columns and "text" not in columns else "text")
    if name not in columns:
        raise RecipeError(
            f"{where} has no column '{name}'; its columns: {', '.join(columns)}. Choose one with --column."
        )
    return name


def _document(value: Any, column: str, where: str, chat: Chat | None) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise QuantkitError(f"{where}: column '{column}' holds {type(value).__name__}; it must hold text.")
    if chat is None:
        raise QuantkitError(f"{where}: column '{column}' holds a conversation, which only calibration can use.")
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        raise QuantkitError(
            f"{where}: column '{column}' holds a list; a conversation is a list of objects with 'role' and 'content'."
        )
    try:
        return chat(value)
    except ValueError as error:
        raise QuantkitError(f"{where}: {error}") from None


def _read_parquet(path: Path, column: str | None, chat: Chat | None) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise QuantkitError(
            f"{path}: reading .parquet needs pyarrow; `pip install 'quantkit[eval]'`, or convert the file to .jsonl."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            name = _column(str(path), column, file.schema_arrow.names)
            values = file.read([name]).column(name).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise QuantkitError(f"{path} is no readable parquet file: {' '.join(str(error).split())}") from None
    return [_document(value, name, f"{path} row {row}", chat) for row, value in enumerate(values)]


def _from_hub(name: str, split: Split, chat: Chat | None) -> Text:
    wanted = HUB[name]
    if split not in wanted.splits:
        raise RecipeError(f"dataset '{name}' is text to calibrate on; measure on another one, for example wikitext2.")
    try:
        import datasets
    except ModuleNotFoundError:
        raise QuantkitError(
            f"dataset '{name}' needs the datasets library: `pip install 'quantkit[eval]'`, "
            f"or point to a local file: {name}=PATH."
        ) from None
    files = {split: wanted.files[split]} if wanted.files else None
    try:
        rows = datasets.load_dataset(wanted.path, wanted.config, data_files=files, split=wanted.splits[split])
    except ConnectionError:
        raise QuantkitError(
            f"dataset '{name}' ({wanted.path}) is not in the local cache and the hub cannot be reached: this machine "
            f"is offline; point to a local file instead: {name}=PATH."
        ) from None
    if wanted.documents is not None:
        rows = rows.select(range(min(wanted.documents, len(rows))))
    values = enumerate(rows[wanted.column])
    documents = [_document(value, wanted.column, f"{name} row {row}", chat) for row, value in values]
    return _as_in_the_papers(name, documents)
