"""The operators that kernels are called through: ``torch.ops.quantkit``.

A compiler sees an operator as one opaque node whose result has the shape and dtype that its ``fake`` says, so packed
weights are not unfolded into dense constants, and nothing inside has to be traceable. ``Library`` costs a third of
``torch.library.custom_op`` per call. Operators have no gradient: dispatch sends calls that need one to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], keys: Sequence[str] = ("CPU",)) -> Any:
    """Register ``schema`` (``name(Tensor x, ...) -> Tensor``) and return the operator.

    Args:
        run: the implementation for tensors of the dispatch keys ``keys`` (CPU, CUDA).
        fake: the same on tensors without data: an empty result.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in keys:
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"quantkit::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.quantkit, name).default
