"""A ``Situation`` for tests of transforms, with nothing observed unless it is given."""

from collections.abc import Collection
from typing import Any

import torch

from quantkit.models.block import Block
from quantkit.plan import resolve
from quantkit.recipe import Scheme
from quantkit.transforms.interface import Situation


def situation(block: Block, linears: Collection[str], scheme: str = "W4A16G64", **changes: Any) -> Situation:
    parsed = Scheme.parse(scheme)
    assert parsed.weights is not None
    weights = parsed.weights
    settings: dict[str, Any] = {
        "block": block,
        "linears": linears,
        "scheme": parsed,
        "weights_of": lambda name: resolve(weights, block.weight(name).shape[1]),
        "scale_dtype": torch.float32,
        "rounding": "rtn",
        "seed": 0,
        "observed": None,
    }
    return Situation(**(settings | changes))
