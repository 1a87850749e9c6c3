"""``quantkit methods``: what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli.console import print_json, table
from quantkit.registry import METHODS

EXAMPLES = """Examples:

quantkit methods

quantkit methods --json
"""


def methods(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """List every method: what it does, its paper, what it needs, and what its output loads in."""
    if as_json:
        hidden = ("module", "statistics", "data")  # how it is wired: not the user's business
        print_json({name: {k: v for k, v in asdict(row).items() if k not in hidden} for name, row in METHODS.items()})
        return
    table(
        ["method", "kind", "what it does", "paper", "needs", "output loads in"],
        [[row.name, row.kind, row.summary, row.paper, row.needs, row.loads_in] for row in METHODS.values()],
    )
