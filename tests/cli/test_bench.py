"""``quantkit bench kernels``: what is printed, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.main import app

QUICK = ["bench", "kernels", "--device", "cpu", "--rounds", "3", "--cache-mb", "0"]


def test_prints_and_writes_every_case(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--shapes", "64x128,32x64", "--rows", "1,3", "--schemes", "W4A16G64,W8A8", "--json", str(out)]
    done = CliRunner().invoke(app, [*QUICK, *flags])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["out", "x", "in", "scheme", "rows", "implementation", "us", "p20", "p80", "x", "dense"]
    written = json.loads(out.read_text())
    assert {"command", "environment", "device", "threads", "dtype", "rows"} == set(written)
    assert written["dtype"] == "bfloat16"
    rows = written["rows"]
    assert len(rows) == len(lines) - 1
    cases = {(*row["shape"], row["scheme"], row["rows"]) for row in rows}
    assert cases == {(o, i, s, n) for o, i in ((64, 128), (32, 64)) for s in ("W4A16G64", "W8A8") for n in (1, 3)}
    for case in cases:
        of_case = [row for row in rows if (*row["shape"], row["scheme"], row["rows"]) == case]
        assert of_case[0]["implementation"] == "dense"
        assert of_case[-1]["implementation"] == "reference"
        assert sum(row["chosen"] for row in of_case) == 1
        assert all(row["p20"] <= row["seconds"] <= row["p80"] for row in of_case)
        assert of_case[0]["speedup"] == 1
        for row in of_case:
            assert row["speedup"] == pytest.approx(of_case[0]["seconds"] / row["seconds"])
    assert sum(" * " in line for line in lines) == len(cases)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "1,0"], "--rows '1,0' cannot be read"),
        (["--rows", "few"], "--rows 'few' cannot be read"),
        (["--shapes", "4096"], "--shapes '4096' cannot be read: write OUTxIN"),
        (["--shapes", "4x4x4"], "--shapes '4x4x4' cannot be read"),
        (["--schemes", "W16A8"], "'W16A8' does not quantise weights"),
        (["--schemes", "W4A4+dct"], "behind + there may be kronecker or hadamard, not 'dct'"),
        (["--schemes", "four"], "scheme 'four' cannot be read"),
        (["--device", "tpu9"], "is no device"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [*QUICK, *flags])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_has_examples() -> None:
    shown = CliRunner().invoke(app, ["bench", "kernels", "--help"]).stdout
    assert "Examples" in shown
    assert "quantkit bench kernels --shapes" in shown
