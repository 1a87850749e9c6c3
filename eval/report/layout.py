"""What a page consists of; ``template.html.jinja`` shows it. All texts are plain text, escaped where they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Picture:
    """A figure and the line below it."""

    svg: str
    """Of ``drawing.picture``: the only thing on a page that is not escaped."""
    caption: str


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None
    """What it is sorted by; None: its text."""
    mood: Literal["better", "worse", ""] = ""


@dataclass(frozen=True)
class Column:
    heading: str
    number: bool = True


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sorted_by: int | None = None
    """Column in whose order, largest first, the rows are; with one, a reader can sort by others. None: not sortable."""

    @property
    def sortable(self) -> bool:
        return self.sorted_by is not None


@dataclass(frozen=True)
class Folded:
    """A table that is shown when one asks for it."""

    summary: str
    table: Table


@dataclass(frozen=True)
class Part:
    """A piece of a section, in the order of its fields; what is empty is left out."""

    heading: str = ""
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    folded: Folded | None = None
    verbatim: str = ""


@dataclass(frozen=True)
class Section:
    key: str
    """Its anchor."""
    heading: str
    parts: Sequence[Part]


def size(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def seconds(count: float) -> str:
    if count < 120:
        return f"{count:.1f} s"
    minutes = round(count / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None, form: str = ".3g", suffix: str = "") -> Cell:
    return Cell("") if value is None else Cell(f"{value:{form}}{suffix}", value)
