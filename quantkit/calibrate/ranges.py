"""The static range of an input: one step, and one zero point where there is any, for all tokens to come.

The range is what the calibration tokens span, or a share of them: outliers of few tokens make every other token's grid
coarse. Token-wise clipping as OS+ does it (Wei et al., arXiv 2304.09145): the range ends at a quantile of the tokens'
own largest values, so it is set by tokens and not by the many small values of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.calibrate.statistics import InputStatistics
from quantkit.kernels.reference import grid_over
from quantkit.recipe import ActivationScheme

UNSEEN_ABSMAX = 8.0
"""Range of an input that no token reached. What enters linears is of the order of 1 (norms see to that), and a range
that is too wide costs precision where one that is too narrow costs the value."""


def static_range(seen: InputStatistics, scheme: ActivationScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The grid over what was seen.

    With ``quantile`` < 1 both ends are pulled in to the quantile of the tokens' absolute maxima; an end that is nearer
    to 0 than that stays. Tokens are told apart by absolute maximum only, so on an input with a zero point whose two
    ends differ it is the farther end that is clipped.

    Args:
        seen: of the input as it meets the rounding (scaled and shifted); with ``range``, and ``tokens`` for a quantile.
        scheme: static.
        dtype: what the step is stored in, and the zero point computed from.

    Returns:
        The step [1] in ``dtype``, positive; the signed code of 0 [1] int8, or None for a symmetric scheme.
    """
    if seen.tokens:
        low, high = seen.minimum.min(), seen.maximum.max()
    else:
        low, high = torch.tensor((-UNSEEN_ABSMAX, UNSEEN_ABSMAX))
    if seen.tokens and scheme.quantile < 1:
        reach = seen.token_quantile(scheme.quantile)
        low, high = low.clamp(min=-reach), high.clamp(max=reach)
    low, high = (end.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max) for end in (low, high))  # of later inputs
    scale, zero_point = grid_over(low.reshape(1), high.reshape(1), scheme, dtype)
    return scale, None if zero_point is None else zero_point.to(torch.int8)
