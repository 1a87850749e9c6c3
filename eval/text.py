"""Text to measure or calibrate on: local files, the demo text, or the hub datasets of the papers.

Which documents, in which order and with what between them decides the number, so it is fixed here:
WikiText-2 is the raw test split joined by blank lines and C4 the first 1100 documents of the first validation shard
joined by spaces, cut to 256 windows, both as in the code of GPTQ (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import QuantkitError, RecipeError, did_you_mean

Split = Literal["test", "train"]

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
    files: dict[Split, str] | None
    """Files of the repository to read instead of a config's, one per split."""
    separator: str = "\n\n"
    documents: int | None = None
    max_windows: int | None = None


HUB = {
    "wikitext2": _HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", None),
    "c4": _HubDataset(
        "allenai/c4",
        None,
        {"test": "en/c4-validation.00000-of-00008.json.gz", "train": "en/c4-train.00000-of-01024.json.gz"},
        separator=" ",
        documents=1100,
        max_windows=256,
    ),
}


def load_text(source: str, *, split: Split = "test", column: str = "text") -> Text:
    """Read the text that ``source`` names.

    Args:
        source: ``demo``, ``wikitext2``, ``c4``, a .txt, .jsonl or .parquet file, a folder of those, or ``NAME=PATH``
            to call a local file ``NAME`` in the results (default: the file's name without its ending); called by the
            name of a hub dataset, it is joined and cut as that one.
        split: ``test`` to measure on, ``train`` to calibrate on; files have no splits and ignore it.
        column: the field of .jsonl and .parquet files that holds the text.

    Raises:
        RecipeError: ``source`` is neither a known name nor a file that can be read, or ``column`` is not in it.
        QuantkitError: the file is empty or damaged, or the hub cannot be reached.
    """
    if source == "demo":
        from quantkit import demo

        path = demo.heldout_text_path() if split == "test" else demo.calibration_text_path()
        return Text("demo", tuple(_read(path, column)))
    if source in HUB:
        return _from_hub(source, split)
    name, path = _local(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FILE_TYPES)
    if not files:
        raise RecipeError(f"folder {path} holds no text; put {', '.join(FILE_TYPES)} files there.")
    documents = [document for file in files for document in _read(file, column)]
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


def _read(path: Path, column: str) -> list[str]:
    """The documents of one file: a .txt file is one."""
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, column)
        text = path.read_text(encoding="utf-8-sig")  # line ends become \n, as wherever Python reads text
    except UnicodeDecodeError as error:
        raise QuantkitError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it, "
            f"for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from None
    except OSError as error:
        raise QuantkitError(f"{path} cannot be read: {error.strerror or error}.") from None
    return _parse_jsonl(path, text, column) if path.suffix == ".jsonl" else [text]


def _parse_jsonl(path: Path, text: str, column: str) -> list[str]:
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
        documents.append(_field(record, column, f"{path} line {number}"))
    return documents


def _field(record: dict[str, Any], column: str, where: str) -> str:
    if column not in record:
        raise _no_column(where, column, list(record))
    if not isinstance(record[column], str):
        raise QuantkitError(f"{where}: column '{column}' holds {type(record[column]).__name__}; it must hold text.")
    return str(record[column])


def _no_column(where: str, column: str, columns: list[str]) -> RecipeError:
    return RecipeError(
        f"{where} has no column '{column}'; its columns: {', '.join(columns)}. Choose one with --column."
    )


def _read_parquet(path: Path, column: str) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise QuantkitError(
            f"{path}: reading .parquet needs pyarrow; `pip install 'quantkit[eval]'`, or convert the file to .jsonl."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                raise _no_column(str(path), column, columns)
            values = file.read([column]).column(column).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise QuantkitError(f"{path} is no readable parquet file: {' '.join(str(error).split())}") from None
    return [_field({column: value}, column, f"{path} row {row}") for row, value in enumerate(values)]


def _from_hub(name: str, split: Split) -> Text:
    wanted = HUB[name]
    try:
        import datasets
    except ModuleNotFoundError:
        raise QuantkitError(
            f"dataset '{name}' needs the datasets library: `pip install 'quantkit[eval]'`, "
            f"or point to a local file: {name}=PATH."
        ) from None
    files = {split: wanted.files[split]} if wanted.files else None
    try:
        rows = datasets.load_dataset(wanted.path, wanted.config, data_files=files, split=split)
    except ConnectionError:
        raise QuantkitError(
            f"dataset '{name}' ({wanted.path}) is not in the local cache and the hub cannot be reached: this machine "
            f"is offline; point to a local file instead: {name}=PATH."
        ) from None
    return _as_in_the_papers(name, list(rows["text"]))
