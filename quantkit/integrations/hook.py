"""Registers quantkit with transformers without importing transformers.

transformers has no plugin discovery: an unknown ``quant_method`` is skipped with a log line and the weights stay
random. So ``import quantkit`` must register, in whichever order the two are imported. Importing transformers and torch
for that would cost seconds in every process, ``quantkit --help`` included. Instead, when transformers' table of
quantizers is not loaded yet, a finder on ``sys.meta_path`` waits for the import of that one module, lets the ordinary
machinery load it, and registers right after.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


class _RegisterAfterImport:
    """A finder that answers for ``_TABLE`` only, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        # On the instance: the loader keeps its type, so that everything that inspects modules works as before.
        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register now if transformers' table exists, otherwise as soon as it does. Safe to call again."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register() -> None:
    # Registers when it is run. Already running if it is what imported transformers: then it registers at its end.
    importlib.import_module("quantkit.integrations.transformers")
