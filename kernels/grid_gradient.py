"""Gradients of rounding to grids over learned shares of their ranges, in closed form.

    y = (q - zero) * step        q = round(clamp(x / step + zero))        range: low = l * min(x), high = u * max(x)

With ``inside`` 1 where the clamp lets x pass, else 0, and gradients straight through every rounding,

    d y / d x = inside
    d y / d step = q - zero - inside * x / step          (Esser et al., LSQ, arXiv 1902.08153, eq. 3)
    d y / d zero = (inside - 1) * step

The step and the zero point follow from low and high (``reference.grid_over``); these go on to l and u, and to the least
and the largest value of the range. A dozen passes over x; recorded operations and their way back take three times that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.recipe import ActivationScheme


def gradients(x: Tensor, shares: Tensor, scheme: ActivationScheme, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(d loss / d x, d loss / d shares) of ``reference.fake_quantize(x, scheme, clip=shares)``.

    Where several values are the least or largest one of a range, they share what goes to it.

    Args:
        x: [..., features].
        shares: [2], l and u.
        grad: d loss / d y, as ``x``.
    """
    if scheme.granularity == "tensor":
        of_x, of_shares = _of_rows(x.reshape(1, -1), shares, scheme, grad.reshape(1, -1))
        return of_x.view(x.shape), of_shares
    if scheme.granularity == "token":
        columns = x.shape[-1]
        of_x, of_shares = _of_rows(x.reshape(-1, columns), shares, scheme, grad.reshape(-1, columns))
        return of_x.view(x.shape), of_shares
    assert scheme.group_size is not None
    of_x, of_shares = torch.empty_like(x), torch.zeros_like(shares)
    whole = x.shape[-1] - x.shape[-1] % scheme.group_size
    for part, width in ((slice(0, whole), scheme.group_size), (slice(whole, None), x.shape[-1] - whole)):
        if width:
            rows, of_rows = x[..., part].reshape(-1, width), grad[..., part].reshape(-1, width)
            found, more = _of_rows(rows, shares, scheme, of_rows)
            of_x[..., part] = found.view(x[..., part].shape)
            of_shares += more
    return of_x, of_shares


def _of_rows(x: Tensor, shares: Tensor, scheme: ActivationScheme, grad: Tensor) -> tuple[Tensor, Tensor]:
    """``gradients`` for one range per row of ``x`` [ranges, values]."""
    least, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low, high = (least * shares[0]).clamp_(max=0), (largest * shares[1]).clamp_(min=0)
    first, last, steps = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1, 2**scheme.bits - 1
    whole = torch.maximum(-low, high) / (steps / 2) if scheme.symmetric else (high - low) / steps
    step = torch.where(whole == 0, torch.finfo(x.dtype).eps, whole)
    position = x / step
    if scheme.symmetric:
        limited = position.clamp(first, last)
        outside = limited != position
        # q - inside * position: what rounding does to the values inside, the end of the grid for those beyond it
        of_step = limited.round_().sub_(position.masked_fill_(outside, 0))
        to_step = of_step.mul_(grad).sum(-1, keepdim=True)
        to_end = to_step.mul_(whole != 0) / (steps / 2)
        upper = high >= -low  # the end that is farther away has it all
        to_low, to_high = -to_end * ~upper, to_end * upper
    else:
        raw = first - low / step
        zero = raw.clamp(first, last).round_()
        shifted = position + zero
        limited = shifted.clamp(first, last)
        outside = limited != shifted
        of_step = limited.round_().sub_(zero).sub_(position.masked_fill_(outside, 0))
        to_step = of_step.mul_(grad).sum(-1, keepdim=True)
        to_zero = -torch.where(outside, grad, 0).sum(-1, keepdim=True).mul_(step)
        to_zero = to_zero * ((raw >= first) & (raw <= last))
        to_step = (to_step + to_zero * low / step.square()) * (whole != 0)
        to_high = to_step / steps
        to_low = -to_high - to_zero / step
    # beyond 0 the ends of a range are 0, whatever the values are
    to_low, to_high = to_low * (least * shares[0] <= 0), to_high * (largest * shares[1] >= 0)
    of_shares = torch.stack(((to_low * least).sum(), (to_high * largest).sum())).to(shares.dtype)
    of_x, to_low, to_high = grad.masked_fill(outside, 0), to_low * shares[0], to_high * shares[1]
    ends = [(least, to_low), (largest, to_high)]
    if scheme.symmetric:
        ends = [(torch.where(upper, largest, least), to_low + to_high)]
    for value, of_value in ends:
        add_where_equal(of_x, x, value, of_value)
    return of_x, of_shares


def add_where_equal(out: Tensor, x: Tensor, value: Tensor, of_value: Tensor) -> None:
    """Add ``of_value`` [..., 1] to ``out`` where ``x``, of one shape [rows, columns] or [rows, groups, columns], is
    ``value`` [..., 1]; where that is in several places of a row or group, they share it."""
    found = (x == value).nonzero(as_tuple=True)
    row = found[0] if x.dim() == 2 else found[0] * x.shape[1] + found[1]
    ties = torch.bincount(row, minlength=of_value.numel())
    out[found] += (of_value.flatten() / ties)[row]
