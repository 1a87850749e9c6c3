"""Quality against stored bits per weight, as an SVG file: which cells no other beats in both."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantkit.eval.report.drawing import INK, MARKERS, RULE, SERIES, picture, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 2
"""Values that are further apart than this factor are drawn on a logarithmic axis."""


class Point(NamedTuple):
    """One checkpoint."""

    name: str
    """Of its series: the method, and how keys and values are kept."""
    bits: float
    """Stored per quantised weight."""
    value: float


def front(points: Iterable[Point], *, higher_is_better: bool = False) -> list[Point]:
    """The points that no other beats in bits and value, by bits; of equal ones the first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.bits, -one.value if higher_is_better else one.value)):
        if not best or (point.value > best[-1].value if higher_is_better else point.value < best[-1].value):
            best.append(point)
    return best


def pareto(title: str, points: list[Point], baseline: float | None, what: str, *, higher_is_better: bool) -> str:
    """The text of an SVG file.

    Args:
        baseline: value of the model as it came; None: not known.
        what: the values are, with the direction that is better left out.
    """

    def draw(figure: Figure, axes: Axes) -> None:
        best = front(points, higher_is_better=higher_is_better)
        axes.plot([one.bits for one in best], [one.value for one in best], color=RULE, linewidth=2.5, zorder=1)
        for number, name in enumerate(dict.fromkeys(one.name for one in points)):
            own = [one for one in points if one.name == name]
            bits, values = [one.bits for one in own], [one.value for one in own]
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            axes.plot(bits, values, linestyle="", color=colour, marker=marker, label=short(name))
        if baseline is not None:
            axes.axhline(baseline, color=INK, linewidth=1, linestyle="--", label="as it came")
        shown = [one.value for one in points] + ([] if baseline is None else [baseline])
        if min(shown) > 0 and max(shown) > _WIDE * min(shown):
            axes.set_yscale("log")
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel(f"{what} ({'higher' if higher_is_better else 'lower'} is better)")
        figure.legend(loc="outside upper center", ncols=3)

    return _file(picture(title, draw, height=4.0))


def _file(svg: str) -> str:
    """A picture of a page as a file of its own, in the page's light colours."""
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    colours = re.search(r":root \{.*?\}", css, re.DOTALL)
    assert colours is not None
    own = f"{colours[0]}\nsvg {{ background: var(--page); color: var(--ink); font-family: sans-serif; }}"
    start, rest = svg.split(">", 1)
    start = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{start}><style>{own}</style>{rest}\n"
