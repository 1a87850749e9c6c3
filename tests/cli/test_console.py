"""On a terminal things are drawn; in a pipe they are plain lines, and stdout holds nothing but results."""

from __future__ import annotations

import json
import re
import sys

import pytest

from quantkit.cli import console
from quantkit.cli.console import Progress, print_json, size, table

ROWS = [["q_proj", "4.25"], ["a [bold] name", "16.00"]]


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called in the test itself: pytest puts new objects in place of stdout and stderr after the fixtures ran."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is the time that progress reads."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_piped_table_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    table(["layer", "bits"], ROWS, right={"bits"}, title="sizes")
    assert capsys.readouterr().out == "sizes\nlayer           bits\nq_proj          4.25\na [bold] name  16.00\n"


def test_a_table_on_a_terminal_is_drawn_and_takes_cells_literally(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch)
    table(["layer", "bits"], ROWS, right={"bits"})
    out = capsys.readouterr().out
    assert "│ a [bold] name │ 16.00 │" in re.sub(r"\x1b\[[0-9;]*m", "", out)


def test_json_is_valid_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "ü", "value": 1.5})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": "ü", "value": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"value": float("inf")})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (7_700_000, "7.7 MB"), (1.24e9, "1.24 GB"), (2.5e13, "25000.00 GB")]
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


def test_piped_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress() as progress:
        progress.start(4, "reading")
        for seconds in (1, 5, 1, 1):
            clock[0] += seconds
            progress.advance(f"file {seconds}")
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    assert re.fullmatch(r"reading 2/4 file 5, 6 s left, \d+\.\d+ [MG]B", first)
    assert re.fullmatch(r"reading 4/4 file 1, 8 s, \d+\.\d+ [MG]B", last)


def test_another_stage_starts_a_new_count(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress() as progress:
        for what in ("quantise", "verify"):
            clock[0] += 60
            progress.update(what, 0, 1)
            clock[0] += 2
            progress.update(what, 1, 1)
    lines = [line.rpartition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["quantise 1/1, 2 s", "verify 1/1, 2 s"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_terminal(monkeypatch)
    with Progress() as progress:
        progress.update("quantise", 0, 3)
        progress.update("quantise", 3, 3, "block [2]")
    captured = capsys.readouterr()
    assert captured.out == ""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.err)
    assert "quantise" in text
    assert "3/3" in text
    assert re.search(r"\d+\.\d+ [MG]B block \[2\]", text)


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True) as progress:
        progress.update("quantise", 1, 1)
    assert capsys.readouterr() == ("", "")
