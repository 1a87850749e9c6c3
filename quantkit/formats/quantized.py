"""One quantised weight matrix in memory: what a rounding returns and what every format stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.recipe import PER_CHANNEL

NF4_LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
"""The 16 levels of NF4 (Dettmers et al., arXiv 2305.14314, appendix E), ascending, float32."""


@dataclass(frozen=True)
class QuantizedWeight:
    """W ~ (codes - zero_point) * scale per group of ``group_size`` input columns; for NF4, levels[codes] * scale.

    The last group of a row may be short: columns j belong to group j // group_size.
    """

    codes: Tensor
    """[out_features, in_features] uint8, unsigned: 0 .. 2**bits - 1."""
    scale: Tensor
    """[out_features, groups] in the dtype it is stored in; the codes were computed with exactly these values."""
    zero_point: Tensor | None
    """[out_features, groups] uint8 in 0 .. 2**bits - 1; None: symmetric, the zero point is 2**(bits - 1) (or NF4)."""
    bits: int
    group_size: int
    """Input columns per scale; PER_CHANNEL: one scale per output row."""
    levels: Literal["uniform", "nf4"] = "uniform"

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]; the arithmetic is done in ``dtype``, as every reader of the formats does it."""
        columns = self.codes.shape[1]
        width = columns if self.group_size == PER_CHANNEL else self.group_size
        scale = self.scale.to(dtype).repeat_interleave(width, dim=1)[:, :columns]
        if self.levels == "nf4":
            return NF4_LEVELS.to(self.codes.device, dtype)[self.codes.long()] * scale
        if self.zero_point is None:
            return (self.codes.to(dtype) - 2 ** (self.bits - 1)) * scale
        zero_point = self.zero_point.to(dtype).repeat_interleave(width, dim=1)[:, :columns]
        return (self.codes.to(dtype) - zero_point) * scale
