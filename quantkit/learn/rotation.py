"""A rotation learned from samples of what it rotates: R of x @ R that leaves the least to be lost by rounding.

    loss      mean over samples of |round(x @ R) - x @ R|^2 / |x|^2
    R     <-  Cay(A) @ R,   A = -step * Y / |Y|,   Y = G R.T - R G.T,   G = d loss / d R
    Cay(A) =  (I - A / 2)**-1 @ (I + A / 2), orthogonal

Steps along the manifold of orthogonal matrices, as SpinQuant takes them (Liu et al., arXiv 2405.16406, section 3.2).
Against SpinQuant, the loss is that of the rounded inputs alone: the model need not be in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.reference import fake_quantize
from quantkit.recipe import ActivationScheme

_BATCH = 1024
"""Samples per step."""
_STEP = 1 / 32
"""|A| of the first step for each square root of a channel; a cosine takes it to 0."""
_LOOKS = 10
"""How often the held-out samples are asked."""


@dataclass(frozen=True)
class Learned:
    """A rotation, and the loss of held-out samples without and with it."""

    matrix: Tensor
    """float64 [n, n]."""
    before: float
    after: float


def learn_rotation(
    samples: Tensor, activations: ActivationScheme, steps: int, seed: int, *, keeps_mean: bool = False
) -> Learned:
    """The best rotation on the way, by every eighth sample, which is held out; I if none is better.

    Args:
        samples: float32 [samples, parts, n]: each is rounded as one row of parts * n, every part rotated alike.
        activations: how. Ranges are those of each sample.
        seed: of the order of the samples.
        keeps_mean: 1 @ R = 1.
    """
    size = samples.shape[-1]
    if not len(samples):
        return Learned(torch.eye(size, dtype=torch.float64), 0.0, 0.0)
    held = torch.arange(len(samples)) % 8 == 7 if len(samples) > 8 else torch.ones(len(samples), dtype=torch.bool)
    tests, lessons = samples[held], samples[~held] if len(samples) > 8 else samples
    generator = torch.Generator().manual_seed(seed)
    # Not in inference mode, in which runs are: gradients are taken.
    with torch.inference_mode(False):
        tests, lessons = tests.clone(), lessons.clone()
        matrix = best = torch.eye(size, dtype=torch.float64)
        with torch.no_grad():
            before = least = float(_loss(tests, matrix.float(), activations))
        for step in range(steps):
            batch = lessons[torch.randperm(len(lessons), generator=generator)[:_BATCH]]
            length = _STEP * math.sqrt(size) * (1 + math.cos(math.pi * step / steps)) / 2
            turned = _step(matrix, _gradient(batch, matrix, activations), length, keeps_mean)
            if turned is None:
                break
            matrix = turned
            if (step + 1) % max(steps // _LOOKS, 1) == 0 or step + 1 == steps:
                with torch.no_grad():
                    loss = float(_loss(tests, matrix.float(), activations))
                if loss < least:
                    best, least = matrix, loss
        return Learned(best.contiguous(), before, least)


def _gradient(batch: Tensor, matrix: Tensor, activations: ActivationScheme) -> Tensor:
    with torch.enable_grad():
        entries = matrix.float().requires_grad_()
        (gradient,) = torch.autograd.grad(_loss(batch, entries, activations), entries)
    return gradient.double()


def _step(matrix: Tensor, gradient: Tensor, length: float, keeps_mean: bool) -> Tensor | None:
    """``matrix`` turned by ``length`` (Frobenius norm) against ``gradient``; None: it does not say where to."""
    product = gradient @ matrix.mT
    skew = product.mT - product
    if keeps_mean:  # rows and columns that sum to 0: Cay(A) leaves 1 where it is
        skew = skew - skew.mean(0, keepdim=True)
        skew = skew - skew.mean(1, keepdim=True)
    norm = float(skew.norm())
    if not math.isfinite(norm) or norm == 0:
        return None
    half = skew * (length / norm / 2)
    one = torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(one - half, matrix + half @ matrix)


def _loss(samples: Tensor, matrix: Tensor, activations: ActivationScheme) -> Tensor:
    turned = (samples @ matrix).flatten(1)
    # All of the range, as is: given as a share of it, the grid has a gradient, and without that rounding has none.
    rounded = fake_quantize(turned, activations, clip=torch.ones(2))
    return ((rounded - turned).square().sum(-1) / turned.detach().square().sum(-1).clamp(min=1e-30)).mean()
