"""From module names to layer formats and back: the patterns that a ``quantization_config`` names its layers with."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from quantkit.formats.layer import LayerFormat

REGEX = "re:"
"""Prefix of a pattern that is a regular expression; everything else is an exact module name."""


@dataclass(frozen=True)
class LayerFormats:
    """Answers what format a module has. Exact names win over expressions, expressions over the default.

    Expressions match a whole name. Ignored names win over everything.
    """

    exact: Mapping[str, LayerFormat] = field(default_factory=dict)
    expressions: tuple[tuple[re.Pattern[str], LayerFormat], ...] = ()
    every_linear: LayerFormat | None = None
    """Format of each linear that nothing else names (the target ``Linear`` of compressed-tensors)."""
    ignored: frozenset[str] = frozenset()
    ignored_expressions: tuple[re.Pattern[str], ...] = ()

    def of(self, name: str) -> LayerFormat | None:
        """The format of the linear ``name`` (module path in the model), or None: full precision."""
        if name in self.ignored or any(expression.fullmatch(name) for expression in self.ignored_expressions):
            return None
        if name in self.exact:
            return self.exact[name]
        for expression, layer in self.expressions:
            if expression.fullmatch(name):
                return layer
        return self.every_linear


def compact(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Patterns that match ``names`` and none of ``others``.

    Names that differ only in numbers (block, expert) become one expression when all such names are meant, so that the
    list does not grow with the model; otherwise each is listed exactly.

    Returns:
        Expressions and exact names, in the order of ``names``. The expressions end in ``$``, because some readers
        match only the start of a name.
    """
    taken = {_numbered(name) for name in others}
    families: dict[str, list[str]] = defaultdict(list)
    for name in names:
        families[_numbered(name)].append(name)
    patterns: list[str] = []
    for family, members in families.items():
        patterns += members if len(members) == 1 or family in taken else [f"{REGEX}{family}$"]
    return patterns


def _numbered(name: str) -> str:
    """``a.3.b`` -> ``a\\.\\d+\\.b``: an expression for every name that differs from this one in numbers only."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
