"""How far the output of a block is from what it should be, sample by sample.

Norm Tweaking (Li et al., arXiv 2309.02784, eq. 2) compares distributions: per channel c the mean and the variance over
the tokens of a sample. mu, s: mean and standard deviation of the output y and of the target f.

    dist_sq_std    mean over c of ((mu_f - mu_y) / n)^2 + ((s_f - s_y) / n)^2        the authors' code; s^2 = var + 1e-6
    dist_abs_var   mean over c of |mu_f - mu_y| / n + |var_f - var_y| / n^2          the paper
    mse            mean over c and tokens of (f - y)^2, over the mean of the channels' variances
    kl             mean over tokens of KL(softmax(f) || softmax(y)), softmax over channels

Variances over tokens are unbiased. n [channels] is 1, or the target's standard deviation over all samples: a few
channels with massive activations would outweigh all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["dist_sq_std", "dist_abs_var", "mse", "kl"]

_EPSILON = 1e-6
"""Added to a variance before its root is taken, which has no gradient at 0."""
_LEAST = 1e-4
"""A channel counts as if its variance were at least this share of the channels' mean."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: ``loss`` + ``mse_weight`` * mse."""

    loss: Loss
    mse_weight: float
    unit: Tensor
    """[channels], n."""
    variance: Tensor
    """[], mean of the channels' variances."""

    def of(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """[samples], 0 for a sample without tokens that count.

        Args:
            output, target: [samples, tokens, channels] float32.
            mask: [samples, tokens] bool, the tokens that count.
        """
        losses = self._one(self.loss, output, target, mask)
        if self.mse_weight:
            losses = losses + self.mse_weight * self._one("mse", output, target, mask)
        return losses

    def measure(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """[samples, 2]: the distance of the distributions, and the mse."""
        distance: Loss = "dist_abs_var" if self.loss == "dist_abs_var" else "dist_sq_std"
        both = [self._one(loss, output, target, mask) for loss in (distance, "mse")]
        return torch.stack(both, dim=1)

    def _one(self, loss: Loss, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        if loss == "mse":
            return _token_mean((output - target).square().mean(dim=-1), mask) / self.variance
        if loss == "kl":
            log_y, log_f = output.log_softmax(dim=-1), target.log_softmax(dim=-1)
            return _token_mean(F.kl_div(log_y, log_f, reduction="none", log_target=True).sum(dim=-1), mask)
        return distribution_loss(loss, output, target, mask, self.unit)


def distribution_loss(loss: Loss, output: Tensor, target: Tensor, mask: Tensor, unit: Tensor) -> Tensor:
    """[samples]; arguments as for ``Objective``."""
    mean, variance = moments(output, mask)
    wanted_mean, wanted_variance = moments(target, mask)
    if loss == "dist_abs_var":
        terms = (mean - wanted_mean).abs() / unit + (variance - wanted_variance).abs() / unit.square()
    else:
        deviation, wanted = (variance + _EPSILON).sqrt(), (wanted_variance + _EPSILON).sqrt()
        terms = ((mean - wanted_mean) / unit).square() + ((deviation - wanted) / unit).square()
    return terms.mean(dim=-1)


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the tokens that count, [samples, channels] each; 0 where there are too few."""
    left_out = ~mask[..., None]
    count = mask.sum(dim=1)[:, None]
    mean = x.masked_fill(left_out, 0).sum(dim=1) / count.clamp(min=1)
    squares = (x - mean[:, None]).square().masked_fill(left_out, 0).sum(dim=1)
    return mean, squares / (count - 1).clamp(min=1)


def channel_units(targets: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """n [channels] and the mean of the channels' variances [], from (target, mask) of all samples.

    Variances are within samples, averaged over them.
    """
    total: Tensor | float = 0.0
    samples = 0
    for target, mask in targets:
        _, variance = moments(target, mask)
        total, samples = total + variance.double().sum(dim=0), samples + len(variance)
    variance = torch.as_tensor(total) / max(samples, 1)
    mean = variance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (variance + _LEAST * mean).sqrt().float(), mean.float()


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[samples, tokens] -> [samples]"""
    return values.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
