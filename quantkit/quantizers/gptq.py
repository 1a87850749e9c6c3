"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, let the later columns make up for the errors.

    min over Q of  ||X Q^T - X W^T||**2 = 2 * loss(Q),   loss(Q) = ||(Q - W) R||**2 / 2,   H = R R^T

H = 2 / tokens * X^T X [in_features, in_features], damped; R is upper triangular. Column i is rounded, its error e
divided by U_ii and spread over the columns j > i: w_j -= e * U_ij, with U = R^-1. The loss is then sum(e**2) / 2.

R comes from one Cholesky factorisation of H in reversed order. U is never formed: the columns of a block b that have
waited for those before them, s, are brought up to date at once by W_b - (Q_s - W_s) R_sb R_bb^-1, and inside the block
U_bb = R_bb^-1. Scales of a group are found on its columns as they are when its first one is reached.

The asymmetric variant (GPTAQ, Li et al., arXiv 2504.02692): X comes from quantised layers before, the float model's
inputs are X'. The least squares answer to X' W^T is rounded instead of W, see ``retargeted_weight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.formats.quantized import QuantizedWeight
from quantkit.quantizers import rtn
from quantkit.quantizers.grid import by_rows, group_count
from quantkit.recipe import PER_CHANNEL, WeightScheme

if TYPE_CHECKING:
    from quantkit.calibrate.statistics import InputStatistics

_DEAD = 1e-10
"""An input with less than this share of the largest second moment was never active: its column is left to RTN."""
_DOUBLE_UP_TO = 8192
"""Inputs up to which the factorisation is done in float64; beyond, H alone would take more than half a GiB of it."""
_LEAF = 16
"""Columns that are updated one by one; wider runs are halved and the second half follows by matrix multiplication."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``gptq``."""

    damping: float = Field(0.01, ge=0, le=1, description="added to the diagonal of H, as a share of its mean")
    order: Literal["natural", "activation", "group"] = Field(
        "activation",
        description="columns in storage order; by falling activation, scales from the uncompensated weights; or by "
        "falling activation inside groups, and groups by their largest",
    )
    clip: Literal["minmax", "mse"] = Field("mse", description="range of a group, as rtn finds it")
    weighted: bool = Field(True, description="clip mse: an error counts for what it adds to the loss, 1 / U_jj**2")
    block: int = Field(128, ge=1, description="columns between two updates of the rest; no influence on the result")
    retarget: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the difference between the inputs here and in the float model that the weights make up "
        "for (GPTAQ): 0.25 helps a little at 2 bits; much more shrinks what the weights emit, block after block",
    )


class HessianError(ValueError):
    """A matrix of second moments that no damping makes positive definite."""


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factorised; linears that read the same input share one."""

    root: Tensor
    """R [columns, columns], upper triangular, columns in processing order; H + damping = R R^T. float64 or float32."""
    order: Tensor
    """[columns] int64: storage index of the column that is processed at each place."""
    dead: Tensor
    """[columns] bool, in processing order: the input was never active."""
    damping: float
    """What was added to the diagonal, as a share of its mean."""


@dataclass(frozen=True)
class Rounded:
    """What ``quantize`` did."""

    weight: QuantizedWeight
    loss: float | None
    """tr((Q - W) (H + damping) (Q - W)^T) / 2 over the active inputs, W retargeted if so asked."""
    damping: float | None
    """The damping that was needed, as a share of the mean of H's diagonal."""
    fallback: str | None
    """Why the weight was rounded to nearest instead; loss and damping are None then."""


@dataclass(frozen=True)
class Prepared:
    """The statistics of one input, ready for every linear that reads it."""

    factor: Factor | HessianError
    cross: Tensor | None = None
    """2 / tokens * (X' - X)^T X [in_features, in_features], X' the inputs in the float model."""


def statistics(config: Config) -> tuple[str, ...]:
    """What ``prepare`` reads."""
    return ("hessian", "cross") if config.retarget else ("hessian",)


def prepare(seen: InputStatistics, scheme: WeightScheme, config: Config) -> Prepared:
    """Factorise the Hessian of an input, for layers of ``scheme``; never fails."""
    cross = seen.cross if config.retarget else None
    try:
        return Prepared(factorise(seen.hessian, scheme.group_size, config), cross)
    except HessianError as error:
        return Prepared(error)


def quantize(
    weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, config: Config, prepared: Prepared
) -> Rounded:
    """Quantise ``weight``, float32 [out_features, in_features], finite.

    Args:
        prepared: the statistics of its input; ones that cannot be used leave round to nearest, with the reason in the
            result.
    """
    factor = prepared.factor
    if isinstance(factor, HessianError):
        plain = rtn.quantize(weight, scheme, scale_dtype, rtn.Config(clip=config.clip))
        return Rounded(plain, loss=None, damping=None, fallback=str(factor))
    if prepared.cross is not None:
        weight = retargeted_weight(weight, prepared.cross, factor, config.retarget)
    rounding = _Rounding(weight, scheme, scale_dtype, config, factor)
    for start in range(0, weight.shape[1], rounding.block):
        rounding.round_block(start)
    return Rounded(rounding.result(), rounding.loss, factor.damping, fallback=None)


def factorise(hessian: Tensor, group_size: int, config: Config) -> Factor:
    """Order, damp and factorise ``hessian``; damping doubles until that succeeds.

    An input that was never active is cut off from the others, so that its column is neither compensated nor used.

    Raises:
        HessianError: values that are not finite, no active input, or not positive definite at a damping of 1.
    """
    if not hessian.isfinite().all():
        raise HessianError("the second moments of the inputs are not finite")
    diagonal = hessian.diagonal().double()
    dead = diagonal <= _DEAD * diagonal.max().clamp(min=0)
    if dead.all():
        raise HessianError("no input was ever active")
    order = _processing_order(diagonal, group_size, config.order)
    backward = order.flip(0)
    matrix = hessian.index_select(0, backward).index_select(1, backward)
    matrix = matrix.to(torch.float64 if len(matrix) <= _DOUBLE_UP_TO else torch.float32)
    gone = dead[backward]
    matrix[gone] = 0
    matrix[:, gone] = 0
    mean, smallest = float(diagonal[~dead].mean()), float(diagonal[~dead].min())
    moments = torch.where(gone, smallest, diagonal[backward])
    for damping in _ladder(config.damping):
        matrix.diagonal().copy_(moments + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return Factor(lower.flip(0, 1), order, dead[order], damping)
    raise HessianError(f"the second moments of the inputs are not positive definite, even with damping {damping:g}")


def _ladder(damping: float) -> Iterator[float]:
    """Dampings to try, up to 1 or a little more."""
    yield damping
    while damping < 1:
        damping = max(2 * damping, 0.01)
        yield damping


def _processing_order(diagonal: Tensor, group_size: int, order: str) -> Tensor:
    """[columns] int64; see ``Config.order``. A short last group stays last, so that groups start where they do."""
    columns = len(diagonal)
    if order == "natural":
        return torch.arange(columns)
    if order == "activation" or group_size == PER_CHANNEL:
        return diagonal.argsort(descending=True, stable=True)
    whole = columns - columns % group_size
    groups = diagonal[:whole].unflatten(0, (-1, group_size))
    inside = groups.argsort(dim=1, descending=True, stable=True) + torch.arange(0, whole, group_size)[:, None]
    by_largest = groups.amax(1).argsort(descending=True, stable=True)
    last = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat([inside[by_largest].flatten(), last])


def retargeted_weight(weight: Tensor, cross: Tensor, factor: Factor, alpha: float) -> Tensor:
    """W + alpha * W D (H + damping)^-1, [out_features, in_features]: what to round when X are not the float inputs.

    At alpha 1 and damping 0, ||X Q^T - X' W^T||**2 = ||X (Q - W*)^T||**2 + const (D is ``cross``). Like every
    regression on noisy inputs it shrinks: what an early block's error has blurred is not predicted but averaged away,
    and behind several blocks of 2 bits alpha 1 costs far more than it wins. An alpha of about 0.25 keeps the gain.
    """
    root = factor.root.to(weight.dtype)
    shift = (weight @ cross.to(weight.dtype)).t().index_select(0, factor.order)
    shift[factor.dead] = 0
    shift = torch.linalg.solve_triangular(root, shift, upper=True)
    shift = torch.linalg.solve_triangular(root.t(), shift, upper=False)
    return weight.index_add(1, factor.order, shift.t(), alpha=alpha)


class _Rounding:
    """One matrix on its way. Its columns come first here, in processing order: [columns, out_features]."""

    def __init__(
        self, weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, config: Config, factor: Factor
    ) -> None:
        rows, columns = weight.shape
        groups = group_count(columns, scheme.group_size)
        width = columns if groups == 1 else scheme.group_size
        self.scheme, self.scale_dtype, self.weighted, self.factor = scheme, scale_dtype, config.weighted, factor
        self.change = weight.t().contiguous().index_select(0, factor.order)
        """The weights that are to come; of the columns that are done, Q - W."""
        self.codes = torch.empty(columns, rows, dtype=torch.uint8)
        self.scale, self.zero = torch.empty(groups, rows), torch.empty(groups, rows)
        self.group_of: list[int] = (factor.order // width).tolist()
        # Where few columns count, the best range is often smaller than rtn's default lets it be.
        self.clip = rtn.Config(clip=config.clip, steps=24, smallest=0.2)
        self.importance = factor.root.diagonal().square().float()
        self.loss = 0.0
        # Without order by activation the groups are contiguous here, and ranges are found as the columns come.
        self.width = width if config.order != "activation" and groups > 1 else 0
        self.block = max(config.block // self.width, 1) * self.width if self.width else config.block
        if not self.width:
            importance = self.importance[factor.order.argsort()]

            def find_ranges(rows: slice) -> None:
                for group, first in enumerate(range(0, columns, width)):
                    members = slice(first, first + width)
                    self.find_range(group, rows, weight[rows, members], importance[members])

            by_rows(find_ranges, len(weight), width)

    def find_range(self, group: int, rows: slice, weight: Tensor, importance: Tensor) -> None:
        """Scale and zero point of a group in some rows, from its ``weight`` [rows, width]."""
        weighting = importance[None] if self.weighted else None
        scale, zero = rtn.find_range(weight.unsqueeze(1), self.scheme, self.scale_dtype, self.clip, weighting)
        self.scale[group, rows], self.zero[group, rows] = scale.flatten(), zero.flatten()

    def round_block(self, start: int) -> None:
        """Round the block of columns that begins at ``start``; all before it are done."""
        block = slice(start, min(start + self.block, len(self.change)))
        root, live = self.factor.root, ~self.factor.dead[block]
        own = root[block, block]
        spread = torch.linalg.solve_triangular(own, torch.eye(len(own), dtype=own.dtype), upper=True)
        before = torch.linalg.solve_triangular(own, root[:start, block], upper=True, left=False)
        spread, before = spread.to(self.change.dtype), before.t().to(self.change.dtype)

        def round_rows(rows: slice) -> float:
            columns = torch.addmm(self.change[block, rows], before, self.change[:start, rows], alpha=-1)
            errors = torch.empty_like(columns)
            self.round_run(start, rows, columns, errors, spread)
            return float(errors[live].square().sum(dtype=torch.float64)) / 2

        self.loss += sum(by_rows(round_rows, self.change.shape[1], len(own)))

    def round_run(self, start: int, rows: slice, columns: Tensor, errors: Tensor, spread: Tensor) -> None:
        """Round the run of ``columns`` that begins at ``start`` and is up to date; ``errors`` receives (w - q) / U_ii.

        Args:
            columns, errors: [run, rows].
            spread: U of the run, [run, run].
        """
        run = len(columns)
        if self.width and start % self.width == 0 and run == min(self.width, len(self.change) - start):
            importance = self.importance[start : start + run]
            self.find_range(self.group_of[start], rows, columns.t().contiguous(), importance)
        if run > _LEAF or 0 < self.width < run:
            # Between groups as long as there are several: a range is found when the run is one whole group.
            half = max(run // 2 // self.width, 1) * self.width if 0 < self.width < run else run // 2
            self.round_run(start, rows, columns[:half], errors[:half], spread[:half, :half])
            columns[half:].addmm_(spread[:half, half:].t(), errors[:half], alpha=-1)
            self.round_run(start + half, rows, columns[half:], errors[half:], spread[half:, half:])
            return
        for i in range(run):
            group = self.group_of[start + i]
            scale, zero = self.scale[group, rows], self.zero[group, rows]
            codes = rtn.nearest_codes(columns[i] / scale, zero, self.scheme)
            rounded = rtn.level_values(codes, zero, self.scheme) * scale
            torch.sub(columns[i], rounded, out=errors[i]).div_(spread[i, i])
            columns[i + 1 :].addr_(spread[i, i + 1 :], errors[i], alpha=-1)
            self.codes[start + i, rows] = codes
            self.change[start + i, rows].neg_().add_(rounded)

    def result(self) -> QuantizedWeight:
        codes = torch.empty_like(self.codes)
        codes[self.factor.order] = self.codes
        scale = self.scale.t().to(self.scale_dtype).contiguous()
        zero_point = None if self.scheme.is_symmetric else self.zero.t().to(torch.uint8).contiguous()
        scheme = self.scheme
        return QuantizedWeight(codes.t().contiguous(), scale, zero_point, scheme.bits, scheme.group_size, scheme.levels)
