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
from quantkit.kernels.reference import fake_quantize
from quantkit.quantizers import rtn
from quantkit.quantizers.grid import by_rows, group_views
from quantkit.recipe import ActivationScheme, WeightScheme

LARGEST_START = torch.tensor(4.0).sigmoid().item()
"""Of a factor, the authors' start. Nearer to 1 the sigmoid hardly has a gradient."""
_SHARES = tuple(1 - step / 20 for step in range(14))
"""Factors that the search for a start tries: 1, 0.95 .. 0.35."""
_PLAIN = rtn.Config(clip="minmax")


def round_weight(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
    """``weight`` float32 [rows, columns] as round to nearest leaves it, with gradients.

    Args:
        scale_dtype: of stored scales.
        ends: [2, rows, groups] from ``reach`` or ``Clip.ends``: the weights are limited to them first; None: ``reach``.
    """
    rounded: Tensor
    if ends is None:
        rounded = _Rounded.apply(weight, reach(weight, scheme), scheme, scale_dtype, False)
    else:
        rounded = _Rounded.apply(weight, ends, scheme, scale_dtype, True)
    return rounded


def reach(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Ends [2, rows, groups] of the range that rounding covers: beyond them there is nothing to cut off.

    With a zero point those of the weights and 0; else as far as the levels reach on either side.
    """
    views = group_views(weight, scheme.group_size)
    low = torch.cat([view.amin(-1) for view in views], dim=1).clamp(max=0)
    high = torch.cat([view.amax(-1) for view in views], dim=1).clamp(min=0)
    if not scheme.is_symmetric:
        return torch.stack((low, high))
    below, above = _level_ends(scheme)
    scale = torch.maximum(low / below, high / above)
    return torch.stack((scale * below, scale * above))


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
        return round_weight(weight, self._scheme, self._scale_dtype, self.ends(weight))


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
    ends = reach(weight, scheme)

    def error(factors: Tensor) -> Tensor:
        rounded = round_weight(weight, scheme, scale_dtype, ends * factors)
        parts = group_views((rounded - weight).mul_(root), scheme.group_size)
        return torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts], dim=1)

    sides = 1 if scheme.is_symmetric else 2
    best = torch.ones(sides, *ends.shape[1:])
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
    """Weights limited to ``ends``, then as ``rtn.quantize`` and back leaves them.

    ``limited`` False: ``ends`` are as far as the weights reach.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ends: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, limited: bool
    ) -> Tensor:
        weight = weight.detach()  # threads know nothing of the mode without gradients in here
        kept = _inside(weight, ends, scheme) if limited else weight
        rounded, scale = rtn.round_values(kept, scheme, scale_dtype, _PLAIN)
        ctx.scheme, ctx.limited = scheme, limited
        ctx.save_for_backward(weight, rounded, ends, scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grads
        weight, rounded, ends, scale = ctx.saved_tensors
        kept = _inside(weight, ends, ctx.scheme) if ctx.limited else weight
        of_scale = _sums((rounded - kept).mul_(grad), ctx.scheme) / scale  # error / scale = q - w / s
        if ctx.scheme.is_symmetric:
            below, above = _level_ends(ctx.scheme)
            upper = ends[1] / above >= ends[0] / below
            of_ends = torch.stack(((of_scale / below).where(~upper, 0.0), (of_scale / above).where(upper, 0.0)))
        else:
            of_end = of_scale / 2**ctx.scheme.bits
            of_ends = torch.stack((-of_end, of_end))
        if ctx.limited:  # what is cut off moves with its limit
            above, below = weight > kept, weight < kept
            of_ends += torch.stack((_sums(grad * below, ctx.scheme), _sums(grad * above, ctx.scheme)))
            grad = grad * ~above.logical_or_(below)
        return grad, of_ends, None, None, None


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
