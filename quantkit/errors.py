"""The two errors that are the user's to fix. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantkitError(Exception):
    """A run that cannot go on: one line with what was given, where, what is allowed, and what to do. Exit status 1."""

    exit_code = 1


class RecipeError(QuantkitError):
    """A request that cannot be carried out as written: recipe, scheme, option or method. Exit status 2."""

    exit_code = 2


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``"Did you mean 'rtn'? Known: nf4, rtn, sinq."``: the tail of an error about an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return (f"Did you mean '{near[0]}'? " if near else "") + f"Known: {', '.join(names)}."
