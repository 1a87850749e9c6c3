"""Post-training quantisation of Hugging Face models: ``quantize`` a model, ``load`` the result.

Importing quantkit is light (no torch, no transformers). It makes transformers able to load native quantkit checkpoints,
whichever of the two is imported first; see ``integrations/hook.py``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError, RecipeError
from quantkit.integrations.hook import register_with_transformers

if TYPE_CHECKING:
    from quantkit.kv.attach import kv_cache
    from quantkit.kv.saved import load_cache
    from quantkit.loading import load
    from quantkit.pipeline import quantize
    from quantkit.recipe import Recipe, Scheme, load_recipe

__all__ = [
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "Scheme",
    "kv_cache",
    "load",
    "load_cache",
    "load_recipe",
    "quantize",
]
__version__ = "0.1.0"

_LAZY = {
    "Recipe": "quantkit.recipe",
    "Scheme": "quantkit.recipe",
    "kv_cache": "quantkit.kv.attach",
    "load": "quantkit.loading",
    "load_cache": "quantkit.kv.saved",
    "load_recipe": "quantkit.recipe",
    "quantize": "quantkit.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


register_with_transformers()
