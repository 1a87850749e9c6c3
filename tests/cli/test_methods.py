"""``quantkit methods`` is the registry, for a person and for a machine."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.kv.methods import CACHE_METHODS
from quantkit.registry import METHODS


def test_one_line_for_each_method() -> None:
    heading, *shown = CliRunner().invoke(app, ["methods"]).stdout.splitlines()
    lines, caches = shown[: len(METHODS)], shown[len(METHODS) :]
    assert heading.split() == ["method", "kind", "what", "it", "does", "paper", "needs", "output", "loads", "in"]
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(row.paper in line and row.summary in line for row, line in zip(METHODS.values(), lines, strict=True))
    assert caches[0] == ""
    assert caches[1].split() == ["cache", "--kv", "what", "it", "does", "paper", "bits", "per", "element"]
    assert [line.split()[0] for line in caches[2:]] == list(CACHE_METHODS)
    assert all(name in line for row, line in zip(CACHE_METHODS.values(), caches[2:], strict=True) for name in row.short)


def test_json_has_what_a_user_chooses_by() -> None:
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert list(listed) == [*METHODS, "kv_cache"]
    kivi = CACHE_METHODS["kivi"]
    assert listed["kv_cache"]["kivi"] == {
        "summary": kivi.summary,
        "paper": kivi.paper,
        "bits_per_element": kivi.bits,
        "names": ["kivi-2bit", "kivi-4bit"],
    }
    sinq = METHODS["sinq"]
    assert listed["sinq"] == {
        "name": "sinq",
        "kind": "transform",
        "summary": sinq.summary,
        "paper": sinq.paper,
        "needs": sinq.needs,
        "loads_in": sinq.loads_in,
    }
