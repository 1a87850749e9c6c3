"""What a tuning is given and what it returns.

A tuning is a module with ``Config`` and ``tune(situation, config)``. It changes what stays in full precision in a block
whose linears are rounded, norms above all, so that the block comes closer to the one it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.models.block import Site

if TYPE_CHECKING:
    from quantkit.calibrate.hidden import HiddenStates
    from quantkit.calibrate.streams import Streams


@dataclass(frozen=True)
class Situation:
    """One block behind its rounding."""

    index: int
    """Of the block."""
    blocks: int
    """Of the model."""
    module: nn.Module
    """Dense, float32; computes what the stored tensors will, rounding of inputs included. Tuning may change the values
    of its parameters; what it leaves there has no effect, only what it returns does."""
    reference: nn.Module | None
    """The block before its linears were rounded, with the same norms; only for a module whose
    ``needs_reference(config)`` says so."""
    streams: Streams
    """Standing before the block; ``quantised`` is what enters it."""
    targets: HiddenStates
    """What the source's block makes of the same samples (of those in the float stream if ``config.target`` is
    ``float``), in the order of ``streams``."""
    sites: Sequence[Site]
    norm_offset: float
    """Norms multiply by (norm_offset + weight)."""
    stored_dtypes: Mapping[str, torch.dtype]
    """Tensor name in the block -> the dtype it will be stored in."""
    seed: int


@dataclass(frozen=True)
class Tuned:
    """New values."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name in the block -> float32 values that the stored dtype can hold. Empty: everything stays."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON-ready, for the run record: losses before and after, what was tried."""
    warning: str | None = None
    """One sentence without the block's name, for the user."""
