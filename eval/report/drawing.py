"""From a matplotlib figure to SVG that is part of a page: its colours and its font are the page's.

Drawn is with colours that occur nowhere else, which are then replaced by ``currentColor`` and by variables of the
page's style sheet: so one picture reads in light and in dark. Nothing of matplotlib's global state, no user's
``matplotlibrc`` and no clock goes into it: the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010a01"
RULE = "#010a02"
SERIES = tuple(f"#010b0{number}" for number in range(1, 9))
"""Stand-ins for ``--c1`` .. ``--c8``, the colours of Okabe and Ito that colour-blind people tell apart."""
MARKERS = "os^Dv<>P"
"""Told apart without colour, as many as ``SERIES``."""

_PAGE_COLOURS = {INK: "currentColor", RULE: "var(--rule)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(SERIES, start=1)
}
WIDTH, HEIGHT = 5.0, 3.1
"""Inches of 72 units. A phone shows the width in about 360 pixels: a unit is a pixel there, and wider elsewhere."""
_LONGEST = 48
"""Characters of a name in a picture."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters: small, selectable, in the page's font
    "text.parse_math": False,  # a layer may be called $x$
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "font.size": 11.0, "axes.labelsize": 11.0, "xtick.labelsize": 10.0, "ytick.labelsize": 10.0,
    "legend.fontsize": 10.0, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.8,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
}  # fmt: skip


def check_libraries() -> None:
    """
    Raises:
        QuantkitError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise QuantkitError(
            f"reports are made with {error.name}, which is not installed: pip install 'quantkit[report]'."
        ) from None


def picture(title: str, draw: Callable[[Figure, Axes], None], *, height: float = HEIGHT) -> str:
    """What ``draw`` puts into a figure with one pair of axes, as an ``<svg>`` element.

    Args:
        title: what it shows, for those who cannot see it; no two pictures of a page have the same.
        height: inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE, "svg.hashsalt": title}
    style.pop("backend", None)
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore")  # glyphs that its own font lacks: the page's is used
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots()
        draw(figure, axes)
        _plain_numbers(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), title)


def _plain_numbers(axes: Axes) -> None:
    """Label logarithmic axes with 0.5, 1, 2: powers of ten would be formulas, which are not parsed."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=8))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())


def short(name: str) -> str:
    """``name`` as it fits into a picture."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"


def _inline(svg: str, title: str) -> str:
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every picture; definitions have names of their own
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub("|".join(_PAGE_COLOURS), lambda found: _PAGE_COLOURS[found[0]], body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(title)}">{body.strip()}'
