"""``quantkit methods`` is the registry, for a person and for a machine."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.registry import METHODS


def test_one_line_for_each_method() -> None:
    heading, *lines = CliRunner().invoke(app, ["methods"]).stdout.splitlines()
    assert heading.split() == ["method", "kind", "what", "it", "does", "paper", "needs", "output", "loads", "in"]
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(row.paper in line and row.summary in line for row, line in zip(METHODS.values(), lines, strict=True))


def test_json_has_what_a_user_chooses_by() -> None:
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert list(listed) == list(METHODS)
    sinq = METHODS["sinq"]
    assert listed["sinq"] == {
        "name": "sinq",
        "kind": "transform",
        "summary": sinq.summary,
        "paper": sinq.paper,
        "needs": sinq.needs,
        "loads_in": sinq.loads_in,
    }
