"""The table that the README shows."""

from __future__ import annotations

import math

from quantkit.eval.before_after import Row, markdown_table


def test_the_table_compares_with_the_original() -> None:
    original = Row("as it came", "", None, 7_940_552, "", {"demo": 20.0})
    quantised = Row("sinq", "W2A16G64", 2.5, 2_000_000, "quantkit", {"demo": 25.0})
    broken = Row("rtn", "W2A16G64", 2.5, 2_000_000, "quantkit", {"demo": math.inf})
    assert markdown_table(original, [quantised, broken]).splitlines() == [
        "| method     | scheme   | bits per weight | format   | checkpoint | perplexity, demo |",
        "| ---        | ---      | ---             | ---      | ---        | ---              |",
        "| as it came |          |                 |          | 7.94 MB    | 20.00            |",
        "| sinq       | W2A16G64 | 2.50            | quantkit | 2.00 MB    | 25.00 (+25.0%)   |",
        "| rtn        | W2A16G64 | 2.50            | quantkit | 2.00 MB    | inf (+inf%)      |",
    ]
