"""Rounding that gradients go through, to the grids that are deployed.

Weights w of a group, limited to low .. high (learned weight clipping of OmniQuant, Shao et al., arXiv 2308.13137):

    low = sigmoid(l) * min(w, 0)      high = sigmoid(u) * max(w, 0)      l, u: learned, per row and group

and rounded as ``quantizers/rtn.py`` rounds what is limited so: bit for bit, by that code. Symmetric and NF4 grids have
one factor for both ends, of as far as the levels reach. Backwards, with the level q of w in units of the scale s,

    d rounded / d w = 1        d rounded / d s = q - w / s                (Esser et al., LSQ, arXiv 1902.08153, eq. 3)
    s = (high - low) / 2**b    with a zero point, which takes no part; exactly as computed without one

Inputs are rounded by ``kernels.reference.fake_quantize``, which passes gradients straight through itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online
from quantkit.kernels.grid_gradient import add_where_equal
from quantkit.kernels.reference import fake_quantize
from quantkit.quantizers import rtn
from quantkit.quantizers.grid import by_rows, group_count, group_views
from quantkit.recipe import PER_CHANNEL, ActivationScheme, WeightScheme

LARGEST_START = torch.tensor(4.0).sigmoid().item()
"""Of a factor, the authors' start. Nearer to 1 the sigmoid hardly has a gradient."""
_SHARES = tuple(1 - step / 20 for step in range(14))
"""Factors that the search for a start tries: 1, 0.95 .. 0.35."""
_PLAIN = rtn.Config(clip="minmax")


def round_weight(
    weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, factors: Tensor | None = None
) -> Tensor:
    """``weight`` float32 [rows, columns] as round to nearest leaves it, with gradients.

    Args:
        scale_dtype: of stored scales.
        factors: [sides, rows, groups] of ``reach``, to which the weights are limited first; sides: lower and upper end,
            or 1 for both. None: they are not.
    """
    rounded: Tensor = _Rounded.apply(weight, factors, scheme, scale_dtype)
    return rounded


def reach(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Ends [2, rows, groups] of the range that rounding covers: beyond them there is nothing to cut off.

    With a zero point those of the weights and 0; else as far as the levels reach on either side.
    """
    return _reach_over(*_extremes(weight, scheme), scheme)


class Clip(nn.Module):
    """Learned limits of the weights of one linear."""

    def __init__(self, start: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> None:
        """
        Args:
            start: [sides, rows, groups] of factors in 0 .. 1; sides: lower and upper end, or 1 for a grid without
                zero point.
        """
        super().__init__()
        self._scheme = scheme
        self._scale_dtype = scale_dtype
        self.logits = nn.Parameter(start.clamp(max=LARGEST_START).logit())

    def restart(self, start: Tensor) -> None:
        """Forget what was learned; ``start`` as before."""
        with torch.no_grad():
            self.logits.copy_(start.clamp(max=LARGEST_START).logit())

    def ends(self, weight: Tensor) -> Tensor:
        """Limits [2, rows, groups] of ``weight`` [rows, columns]."""
        return reach(weight, self._scheme) * self.logits.sigmoid()

    def forward(self, weight: Tensor) -> Tensor:
        """``weight``, limited and rounded."""
        return round_weight(weight, self._scheme, self._scale_dtype, self.logits.sigmoid())


def search_factors(
    weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """Factors [sides, rows, groups] to start ``Clip`` with: those with the least squared error of the weights.

    Shares 1, 0.95 .. 0.35 of the range are tried; with a zero point first of both ends, then of the lower, then of the
    upper one.

    Args:
        weight: [rows, columns] float32.
        importance: [columns], what the squared errors count; None: all the same.
    """
    root = torch.ones(weight.shape[1]) if importance is None else importance.sqrt()

    def search(chunk: slice) -> Tensor:
        return _search(weight[chunk], scheme, scale_dtype, root)

    with torch.no_grad():
        return torch.cat(by_rows(search, *weight.shape), dim=1)


def _search(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, root: Tensor) -> Tensor:
    def error(factors: Tensor) -> Tensor:
        rounded = round_weight(weight, scheme, scale_dtype, factors)
        parts = group_views((rounded - weight).mul_(root), scheme.group_size)
        return torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts], dim=1)

    sides = 1 if scheme.is_symmetric else 2
    best = torch.ones(sides, len(weight), group_count(weight.shape[1], scheme.group_size))
    least = error(best)
    for phase in ((True,),) if sides == 1 else ((True, True), (True, False), (False, True)):
        moved = torch.tensor(phase)[:, None, None]
        base = best
        for share in _SHARES:
            tried = torch.where(moved, share, base)
            found = error(tried)
            best = torch.where(found < least, tried, best)
            least = torch.minimum(found, least)
    return best


class InputRounding:
    """A forward pre-hook for linears that read one signal: x -> round(op((x - shift) * scale)).

    Linears that are called with the same tensor one after the other get the same tensor.
    """

    def __init__(self, activations: ActivationScheme | None) -> None:
        """
        Args:
            activations: the grid; static ones are rounded over the range at hand. None: nothing is rounded.
        """
        self._activations = activations
        self.scale: Tensor | None = None
        """[columns]; None: 1."""
        self.shift: Tensor | None = None
        """[columns]; None: 0."""
        self.op = LayerInputs()
        """The matrix, in float32."""
        self.clip: Tensor | None = None
        """[2], shares of the ends of ranges; None: all of them, without gradients. Dynamic grids only."""
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if self._last is None or self._last[0] is not x:
            self._last = x, self._changed(x)
        return (self._last[1], *args[1:])

    def forget(self) -> None:
        """Drop what the last call left. To be called before anything here becomes something else."""
        self._last = None

    def _changed(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = x - self.shift
        if self.scale is not None:
            x = x * self.scale
        if self.op.op != "none":
            with torch.autocast(x.device.type, enabled=False):  # what is rounded is computed as at run time
                x = online.apply(x, self.op)
        return x if self._activations is None else fake_quantize(x, self._activations, clip=self.clip)


class _Rounded(torch.autograd.Function):
    """Weights limited to ``factors`` of their reach, then as ``rtn.quantize`` and back leaves them.

    In closed form, and in few passes over the weights: a step on few samples spends as much here as on its samples.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, factors: Tensor | None, scheme: WeightScheme, scale_dtype: torch.dtype
    ) -> Tensor:
        weight = weight.detach()  # threads know nothing of the mode without gradients in here
        extremes = _extremes(weight, scheme)
        kept = weight if factors is None else _inside(weight, _reach_over(*extremes, scheme) * factors.detach(), scheme)
        rounded, scale = rtn.round_values(kept, scheme, scale_dtype, _PLAIN)
        ctx.scheme = scheme
        ctx.save_for_backward(weight, factors, *extremes, rounded, scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,), scheme = grads, ctx.scheme
        weight, factors, least, largest, rounded, scale = ctx.saved_tensors
        kept, of_weight, of_ends = weight, grad, torch.zeros(2, *least.shape)
        if factors is not None:  # what is cut off, which is little, moves with its limit
            kept = _inside(weight, _reach_over(least, largest, scheme) * factors, scheme)
            cut = weight != kept
            row, column = cut.nonzero(as_tuple=True)
            group = 0 if scheme.group_size == PER_CHANNEL else column // scheme.group_size
            end = ((weight[row, column] > 0) * len(weight) + row) * least.shape[1] + group
            of_ends = torch.bincount(end, grad[row, column], of_ends.numel()).view_as(of_ends)
            of_weight = grad.masked_fill(cut, 0)
        of_scale = _sums((rounded - kept).mul_(grad), scheme) / scale  # error / scale = q - w / s
        if scheme.is_symmetric:  # one length decides on both ends, that of the farther extreme in units of its level
            below, above = _level_ends(scheme)
            upper = largest / above >= least / below
            length = torch.where(upper, largest / above, least / below)[None]
            of_length = (of_scale + of_ends[0] * below + of_ends[1] * above)[None]
        else:
            length = torch.stack((least, largest))
            of_length = of_ends + torch.stack((-of_scale, of_scale)) / 2**scheme.bits
        of_factors = None
        if factors is not None:
            of_factors, of_length = of_length * length, of_length * factors
        if scheme.is_symmetric:
            ends = [(torch.where(upper, largest, least), of_length[0] / torch.where(upper, above, below))]
        else:
            ends = [(least, of_length[0]), (largest, of_length[1])]
        of_weight = of_weight.clone() if factors is None else of_weight
        first = 0
        for part, out in zip(*(group_views(matrix, scheme.group_size) for matrix in (weight, of_weight)), strict=True):
            groups = slice(first, first + part.shape[1])
            for value, of_value in ends:
                add_where_equal(out, part, value[:, groups, None], of_value[:, groups, None])
            first = groups.stop
        return of_weight, of_factors, None, None


def _extremes(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """(least, largest) [rows, groups] of every group and 0."""
    views = group_views(weight, scheme.group_size)
    least = torch.cat([view.amin(-1) for view in views], dim=1).clamp_(max=0)
    return least, torch.cat([view.amax(-1) for view in views], dim=1).clamp_(min=0)


def _reach_over(least: Tensor, largest: Tensor, scheme: WeightScheme) -> Tensor:
    """``reach`` of weights with these extremes."""
    if not scheme.is_symmetric:
        return torch.stack((least, largest))
    below, above = _level_ends(scheme)
    scale = torch.maximum(least / below, largest / above)
    return torch.stack((scale * below, scale * above))


def _inside(weight: Tensor, ends: Tensor, scheme: WeightScheme) -> Tensor:
    """``weight`` with every group limited to its ``ends`` [2, rows, groups]."""
    kept, first = torch.empty_like(weight), 0
    parts = (group_views(matrix, scheme.group_size) for matrix in (weight, kept))
    for part, out in zip(*parts, strict=True):
        low, high = ends[:, :, first : first + part.shape[1], None]
        torch.clamp(part, low, high, out=out)
        first += part.shape[1]
    return kept


def _sums(values: Tensor, scheme: WeightScheme) -> Tensor:
    """Of every group of ``values`` [rows, columns]: [rows, groups]."""
    return torch.cat([part.sum(-1) for part in group_views(values, scheme.group_size)], dim=1)


def _level_ends(scheme: WeightScheme) -> tuple[float, float]:
    """How far weights reach without a zero point, in units of the scale: half a step past the outer levels."""
    half = 2 ** (scheme.bits - 1)
    return (-1.0, 1.0) if scheme.levels == "nf4" else (-half - 0.5, half - 0.5)
