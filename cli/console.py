"""What the commands share: tables and results on stdout, progress and messages on stderr, nothing else anywhere.

On a terminal a table is drawn and progress is a bar; in a pipe both become plain lines that ``awk`` and a log file
can take. stdout carries results only, so ``--json > file`` always gives valid JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 5.0
"""How often progress writes a line when stderr is not a terminal."""


def say(message: str) -> None:
    """One line for the person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    """The result for a machine, on stdout. NaN and infinity are no JSON: the caller turns them into None."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = (), title: str = ""
) -> None:
    """Print ``rows`` on stdout, drawn on a terminal, aligned with spaces in a pipe.

    Args:
        columns: the headings.
        rows: one cell per column.
        right: headings of the columns that are aligned to the right (numbers).
        title: a line above.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        drawn = Table(title=escape(title) or None, title_justify="left")
        for column in columns:
            drawn.add_column(escape(column), justify="right" if column in right else "left")
        for row in rows:
            drawn.add_row(*(escape(cell) for cell in row))
        Console().print(drawn)
        return
    if title:
        print(title)
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


def size(count: float) -> str:
    """Bytes as a person reads them: 7.7 MB, 1.24 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def quiet_libraries() -> None:
    """Keep the bars and hints of transformers out of a command's output; its errors still show."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _memory() -> str:
    """What this process holds in memory now."""
    from quantkit.process import rss

    return size(rss())


class Progress:
    """Shows work that is counted: a bar with ETA and current memory on a terminal, else a line every few seconds.

    ``update`` is the callback that long work takes; the other two are for counting by hand::

        with Progress() as progress:
            quantize(..., on_progress=progress.update)

        with Progress() as progress:
            progress.start(len(files), "reading")
            for file in files:
                progress.advance(file.name)

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._what = ""
        self._total = 0
        self._done = 0
        self._started = 0.0
        self._last_line = 0.0
        self._bar: _Bar | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            self._bar = _Bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, total: int, what: str) -> None:
        """Begin counting ``total`` units of ``what``."""
        self._what, self._total, self._done = what, total, 0
        self._started = self._last_line = time.monotonic()
        if self._bar:
            self._bar.start(total, what)

    def advance(self, label: str = "") -> None:
        """One more unit is done; ``label`` names it."""
        self.update(self._what, self._done + 1, self._total, label)

    def update(self, what: str, done: int, total: int, label: str = "") -> None:
        """``done`` of ``total`` units of ``what`` are finished; another ``what`` starts a new count."""
        if (what, total) != (self._what, self._total) or done < self._done:
            self.start(total, what)
        self._done = done
        if self._bar:
            self._bar.update(done, _memory(), label)
        elif not self._quiet and done:
            self._line(label)

    def _line(self, label: str) -> None:
        now = time.monotonic()
        finished = self._done == self._total
        if not finished and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        seconds = now - self._started
        ahead = f"{seconds:.0f} s" if finished else f"{seconds / self._done * (self._total - self._done):.0f} s left"
        unit = f"{self._what} {self._done}/{self._total}" + (f" {label}" if label else "")
        say(f"{unit}, {ahead}, {_memory()}")


class _Bar:
    """The terminal's face of ``Progress``; rich is imported only here."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}", markup=False),
            TextColumn("{task.fields[label]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._rich.add_task("", total=None, visible=False, memory="", label="")
        self._rich.start()

    def start(self, total: int, what: str) -> None:
        self._rich.reset(self._task, total=total, description=what, visible=True, memory="", label="")

    def update(self, done: int, memory: str, label: str) -> None:
        self._rich.update(self._task, completed=done, memory=memory, label=label)

    def stop(self) -> None:
        self._rich.stop()
