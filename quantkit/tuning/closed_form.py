"""The norm that makes up best for the rounding of the linears that read it, in closed form.

A norm's output X [tokens, channels] is read by linears with rounded weights Q_k that had the weights W_k. With X
replaced by X diag(s) + 1 t^T, the squared error of their outputs is

    sum over k of || Y W_k^T - (X diag(s) + 1 t^T) Q_k^T ||^2                   Y: what the norm emits in the target

With H = X^T X, C = X^T Y, m = X^T 1, p = Y^T 1, A_k = W_k^T Q_k, B_k = Q_k^T Q_k and N tokens, its gradient is 0 where

    [ sum H * B_k          sum diag(m) B_k ] [s]   [ sum diag(C A_k) ]
    [ sum B_k diag(m)      sum N B_k       ] [t] = [ sum A_k^T p     ]          *: elementwise

H, C, m, p and N are those of linear k: an expert reads the tokens that are routed to it. Ridge terms pull s to 1 and t
to 0. A norm without bias has s alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calibrate.observe import observe
from quantkit.calibrate.statistics import InputStatistics, Want
from quantkit.calibrate.streams import Streams
from quantkit.models.block import Site


@dataclass(frozen=True)
class Reader:
    """A linear that reads the norm; [channels, channels] and [channels], float64."""

    rounded: Tensor
    """[rows, channels], Q."""
    weight: Tensor
    """[rows, channels], W."""
    moment: Tensor
    """H"""
    cross: Tensor
    """C"""
    total: Tensor
    """m"""
    target_total: Tensor
    """p"""
    tokens: int
    """N"""


def solve_norm(readers: Sequence[Reader], ridge: float, *, shift: bool) -> tuple[Tensor, Tensor | None]:
    """s and t, [channels] float64 each; t only with ``shift``.

    Args:
        ridge: its terms are this share of the mean of the diagonal they are added to.
    """
    parts = [_equations(reader) for reader in readers]
    square, right, low, low_right, off = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
    square, right = _with_ridge(square, right, ridge, 1.0)
    if not shift:
        return torch.linalg.solve(square, right), None
    low, low_right = _with_ridge(low, low_right, ridge, 0.0)
    system = torch.cat([torch.cat([square, off], dim=1), torch.cat([off.t(), low], dim=1)])
    s, t = torch.linalg.solve(system, torch.cat([right, low_right])).chunk(2)
    return s, t


def _equations(reader: Reader) -> tuple[Tensor, ...]:
    """The four blocks' sums for one linear: H * B, diag(C A), N B, A^T p, diag(m) B."""
    products = reader.rounded.t() @ reader.rounded
    mixed = reader.weight.t() @ reader.rounded
    return (
        reader.moment * products,
        (reader.cross * mixed.t()).sum(dim=1),
        reader.tokens * products,
        mixed.t() @ reader.target_total,
        reader.total[:, None] * products,
    )


def _with_ridge(square: Tensor, right: Tensor, ridge: float, towards: float) -> tuple[Tensor, Tensor]:
    size = float(square.diagonal().mean())
    strength = ridge * size if size > 0 else 1.0  # nothing was seen: any pull keeps what is there
    return square + strength * torch.eye(len(square), dtype=square.dtype), right + strength * towards


def readers_of(
    site: Site, module: nn.Module, reference: nn.Module, streams: Streams, *, from_float: bool
) -> list[Reader]:
    """The linears that read the norm of ``site``, with what enters them; empty if some are inside merged experts.

    Args:
        module: the block with rounded linears.
        reference: the same block before they were rounded.
        streams: standing before the block.
        from_float: the target is what ``reference`` makes of the float stream; otherwise of the same one.
    """
    modules = dict(module.named_modules())
    if not all(name in modules for name in site.consumers):
        return []
    want: tuple[Want, ...] = ("hessian", "mean", "cross") if from_float else ("hessian", "mean")
    seen = observe(streams, module, site.consumers, want, reference=reference if from_float else None).inputs
    wanted = seen
    if from_float:
        mean: tuple[Want, ...] = ("mean",)
        wanted = observe(streams, reference, site.consumers, mean, stream="float").inputs
    before = dict(reference.named_modules())
    return [_reader(modules[name], before[name], seen[name], wanted[name], from_float) for name in site.consumers]


def _reader(
    rounded: nn.Module, before: nn.Module, seen: InputStatistics, wanted: InputStatistics, from_float: bool
) -> Reader:
    half = seen.tokens / 2  # statistics are 2 / tokens times a sum
    moment = seen.hessian.double() * half
    cross = moment + seen.cross.double().t() * half if from_float else moment
    total = seen.mean.double() * seen.tokens
    return Reader(
        rounded=_weight(rounded),
        weight=_weight(before),
        moment=moment,
        cross=cross,
        total=total,
        target_total=wanted.mean.double() * wanted.tokens,
        tokens=seen.tokens,
    )


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double()
