"""``quantkit methods``: what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli.console import print_json, table
from quantkit.kv.methods import CACHE_METHODS
from quantkit.registry import METHODS

EXAMPLES = """Examples:

quantkit methods

quantkit methods --json
"""


def methods(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """List every method: what it does, its paper, what it needs, and what its output loads in."""
    if as_json:
        hidden = ("module", "statistics", "data")  # how it is wired: not the user's business
        listed = {name: {k: v for k, v in asdict(row).items() if k not in hidden} for name, row in METHODS.items()}
        caches = {
            name: {"summary": row.summary, "paper": row.paper, "bits_per_element": row.bits, "names": list(row.short)}
            for name, row in CACHE_METHODS.items()
        }
        print_json(listed | {"kv_cache": caches})
        return
    table(
        ["method", "kind", "what it does", "paper", "needs", "output loads in"],
        [[row.name, row.kind, row.summary, row.paper, row.needs, row.loads_in] for row in METHODS.values()],
    )
    print()
    table(
        ["cache", "--kv", "what it does", "paper", "bits per element"],
        [[row.name, " ".join(row.short), row.summary, row.paper, row.bits] for row in CACHE_METHODS.values()],
    )
