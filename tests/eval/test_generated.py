"""The tables of the README files say what eval/results says."""

import pytest

from quantkit.errors import QuantkitError
from quantkit.eval import generated


@pytest.mark.parametrize("name", generated.FILES)
def test_readme_files_are_up_to_date(name):
    text = (generated.ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert generated.with_tables(text, name) == text, "run `make tables`"


def test_a_wrong_number_is_put_right_and_all_else_left():
    text = (generated.ROOT / "README.md").read_text(encoding="utf-8")
    broken = text.replace("| 55.12 |", "| 5.12 |").replace("**54.91**", "54.91")
    assert broken != text
    assert generated.with_tables(broken, "README.md") == text


def test_the_lowest_is_bold_unless_all_are_the_same():
    assert generated._column([54.838, 54.841, 54.843]) == ["54.84", "54.84", "54.84"]
    assert generated._column([2181.767, 59.5562, 59.2451]) == ["2182", "59.56", "**59.25**"]
    assert generated._column([55.101, 55.099, 142.83]) == ["**55.10**", "**55.10**", "142.8"]


def test_marks_that_cannot_be_filled():
    with pytest.raises(QuantkitError, match=r"x\.md: there is no table 'waits'; known: weights, "):
        generated.with_tables("<!-- table: waits -->\n<!-- /table -->\n", "x.md")
    with pytest.raises(QuantkitError, match="needs its '<!-- /table -->' behind it"):
        generated.with_tables("<!-- table: weights -->\n", "x.md")
    with pytest.raises(QuantkitError, match=r"weights.jsonl has no rtn W5A16 of bench-llama on novels"):
        generated.best_of("", "weights.jsonl", ["rtn"], [("", "bench-llama", "W5A16")])


def test_what_is_not_measured_yet_is_left_empty():
    columns = [("", "bench-llama", scheme) for scheme in ("W4A16G64", "W5A16")]
    rows = generated.best_of("", "weights.jsonl", ["rtn", "sinq"], columns, gaps=True).splitlines()[2:]
    assert all(row.endswith(" |  |") for row in rows)
    assert "55.12" in rows[0]
