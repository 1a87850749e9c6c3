"""The pictures of a report, one function each: numbers -> an ``<svg>`` element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.eval.report.drawing import INK, MARKERS, RULE, SERIES, picture, short
from quantkit.eval.report.record import Learning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = SERIES[0], SERIES[1]
_WIDE = 20
"""Numbers that are further apart than this factor are drawn on a logarithmic axis."""
_FEW = 16
"""Blocks whose points have markers; more would run into each other."""
HEAT_COLUMNS = 256
"""Columns of a heat-map; of channels that share one the largest is shown, so that none is lost."""


def block_losses(title: str, before: Mapping[int, float], after: Mapping[int, float], unit: str) -> str:
    """What a method found and what it left, block by block.

    Args:
        before: block -> loss, as ``after``.
        unit: what the losses are.
    """

    def draw(_: Figure, axes: Axes) -> None:
        for block in sorted(before.keys() & after.keys()):
            axes.plot([block, block], [before[block], after[block]], color=RULE, linewidth=2.5, zorder=1)
        axes.plot(list(before), list(before.values()), "o", color=INK, markerfacecolor="none", label="before")
        axes.plot(list(after), list(after.values()), "o", color=BLUE, label="after")
        _scale(axes, [*before.values(), *after.values()])
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
        _blocks(axes, unit)

    return picture(title, draw)


def errors_by_kind(title: str, errors: Mapping[str, Mapping[int, float]]) -> str:
    """Relative weight error of each kind of linear (at most 8 of them), block by block.

    Args:
        errors: kind -> block -> error, 0 .. 1.
    """

    def draw(figure: Figure, axes: Axes) -> None:
        for (kind, of_block), colour, marker in zip(errors.items(), SERIES, MARKERS, strict=False):
            shown = [100 * error for error in of_block.values()]
            few = len(of_block) <= _FEW
            axes.plot(list(of_block), shown, marker=marker if few else "", color=colour, label=short(kind))
        _scale(axes, [100 * error for of_block in errors.values() for error in of_block.values()])
        columns = 3 if max(len(short(kind)) for kind in errors) <= 16 else 2
        figure.legend(loc="outside upper center", ncols=columns)
        _blocks(axes, "weight error (%)")

    return picture(title, draw, height=3.6)


def bars(title: str, values: Mapping[int, float], unit: str) -> str:
    """One number per block, from 0 on."""

    def draw(_: Figure, axes: Axes) -> None:
        axes.bar(list(values), list(values.values()), color=BLUE, width=0.75)
        axes.grid(axis="x", visible=False)
        _blocks(axes, unit)

    return picture(title, draw, height=2.7)


def learning(title: str, curves: Mapping[int, Learning]) -> str:
    """Hold-out loss of each block over what it was before the first step.

    Up to 8 blocks have a colour each; of more, those that won least and most are named.
    """
    relative = {}
    for block, curve in curves.items():
        start = curve.holdout[0] if curve.holdout else None
        if start:
            relative[block] = [float("nan") if loss is None else loss / start for loss in curve.holdout]
    order = sorted(relative, key=lambda block: min(relative[block]))  # most won first; nan is never less
    named = {order[0]: f"block {order[0]}, won most", order[-1]: f"block {order[-1]}, won least"} if order else {}

    def draw(figure: Figure, axes: Axes) -> None:
        for number, (block, losses) in enumerate(relative.items()):
            epochs = range(len(losses))
            if len(relative) <= len(SERIES):
                colour, marker = SERIES[number], MARKERS[number]
                axes.plot(epochs, losses, color=colour, marker=marker, label=f"block {block}")
            elif block not in named:
                axes.plot(epochs, losses, color=INK, alpha=0.35, linewidth=0.9)
        for (block, label), colour in zip(named.items(), (BLUE, ORANGE), strict=False):
            if len(relative) > len(SERIES):
                axes.plot(range(len(relative[block])), relative[block], color=colour, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("hold-out loss, start = 1")
        _whole_numbers(axes)
        figure.legend(loc="outside upper center", ncols=3)

    return picture(title, draw, height=3.4)


def learning_of_block(title: str, curve: Learning) -> str:
    """Training and hold-out loss of one block; the epoch that was kept is marked."""

    def draw(_: Figure, axes: Axes) -> None:
        train = [float("nan") if loss is None else loss for loss in curve.train]
        holdout = [float("nan") if loss is None else loss for loss in curve.holdout]
        axes.plot(range(1, len(train) + 1), train, marker="s", color=ORANGE, label="training")
        axes.plot(range(len(holdout)), holdout, marker="o", color=BLUE, label="hold-out")
        axes.plot(
            [curve.best_epoch], [holdout[curve.best_epoch]], "o", color=INK, markersize=10, markerfacecolor="none",
            label="kept",
        )  # fmt: skip
        _scale(axes, [*train, *holdout])
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        _whole_numbers(axes)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)

    return picture(title, draw, height=2.7)


def channel_curves(title: str, curves: Mapping[str, Tensor]) -> str:
    """Largest |x| of every channel over the input's root mean square, largest channel first.

    Args:
        curves: label -> [channels], in any order.
    """

    def draw(_: Figure, axes: Axes) -> None:
        for (label, values), colour, dashes in zip(curves.items(), (ORANGE, BLUE), ("--", "-"), strict=False):
            axes.plot(values.sort(descending=True).values.tolist(), dashes, color=colour, label=label)
        _scale(axes, [value for values in curves.values() for value in values.tolist()])
        axes.set_xlabel("channels, largest first")
        axes.set_ylabel("largest |x| / rms")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)

    return picture(title, draw, height=2.7)


def heat_map(title: str, sample: Tensor, largest: float) -> str:
    """|x| over the input's root mean square, token by channel.

    Args:
        sample: [tokens, channels], already divided.
        largest: end of the colour scale, the same for pictures that are to be compared.
    """
    values = pooled(sample.abs(), HEAT_COLUMNS)

    def draw(figure: Figure, axes: Axes) -> None:
        from matplotlib.colors import PowerNorm

        extent = (0, sample.shape[1], len(sample), 0)
        norm = PowerNorm(0.5, vmin=0, vmax=max(largest, 1e-6))
        drawn = axes.imshow(
            values.numpy(), cmap="viridis", norm=norm, aspect="auto", interpolation="none", extent=extent
        )
        axes.grid(visible=False)
        axes.set_xlabel("channel")
        axes.set_ylabel("token")
        bar = figure.colorbar(drawn, ax=axes, label="|x| / rms", pad=0.02)
        bar.outline.set_visible(False)

    return picture(title, draw, height=2.7)


def pooled(values: Tensor, columns: int) -> Tensor:
    """values [rows, K] -> [rows, at most columns]: the largest of neighbours."""
    width = -(-values.shape[1] // columns)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % width), value=-torch.inf)
    return padded.unflatten(1, (-1, width)).amax(dim=2)


def histogram(title: str, edges: Tensor, shares: Tensor) -> str:
    """Distribution of weights on a logarithmic axis.

    Args:
        edges: [bins + 1].
        shares: [bins], adding up to 1.
    """

    def draw(_: Figure, axes: Axes) -> None:
        axes.stairs((100 * shares).tolist(), edges.tolist(), fill=True, color=BLUE)
        axes.set_yscale("log")
        axes.set_xlabel("weight, as decoded")
        axes.set_ylabel("weights (%)")

    return picture(title, draw, height=2.4)


def code_use(title: str, shares: Tensor) -> str:
    """How often each code is used.

    Args:
        shares: [2**bits], adding up to 1.
    """

    def draw(_: Figure, axes: Axes) -> None:
        axes.bar(range(len(shares)), (100 * shares).tolist(), width=0.85 if len(shares) <= 32 else 1.0, color=ORANGE)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("code")
        axes.set_ylabel("weights (%)")
        _whole_numbers(axes)

    return picture(title, draw, height=2.4)


def _blocks(axes: Axes, unit: str) -> None:
    axes.set_xlabel("block")
    axes.set_ylabel(unit)
    _whole_numbers(axes)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """From 0 on, or logarithmic where small ones could not be told apart."""
    positive = [value for value in values if 0 < value < math.inf]
    if positive and max(positive) > _WIDE * min(positive):
        axes.set_yscale("log", nonpositive="mask")
    elif positive:
        axes.set_ylim(0, 1.06 * max(positive))
