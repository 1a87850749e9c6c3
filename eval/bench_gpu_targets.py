"""What the kernels are to reach on an H200, and whether ``bench_gpu``'s figures do.

Times are those inside a CUDA graph, with weights that are not in the cache; layers are gate and up of Llama-3-8B
together (28672 x 4096) where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf, isnan
from operator import itemgetter
from typing import Any, NamedTuple

from quantkit.eval.bench_gpu_gemlite import NAME, OURS

Figures = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a part -> its rows."""

GATE_UP = (28672, 4096)


class Target(NamedTuple):
    """A bound on figures, all of which must keep it."""

    what: str
    bound: float
    at_least: bool
    unit: str
    figures: Callable[[Figures], Iterable[float]]


def judged(found: Figures) -> list[dict[str, Any]]:
    """A row for each target: the worst of its figures, and whether it is ``met``, ``not met`` or ``not measured``."""
    return [_judge(target, [*target.figures(found)]) for target in TARGETS]


def _judge(target: Target, figures: list[float]) -> dict[str, Any]:
    aim = f"{'at least' if target.at_least else 'at most'} {target.bound:g} {target.unit}"
    row: dict[str, Any] = {"target": target.what, "aim": aim, "worst": None, "figures": len(figures)}
    if not figures:
        return row | {"result": "not measured"}
    worst = min(figures) if target.at_least else max(figures)
    met = worst >= target.bound if target.at_least else worst <= target.bound
    return row | {"worst": worst, "result": "met" if met else "not met"}


def _linears(
    found: Figures,
    scheme: str,
    rows: Sequence[int],
    figure: Callable[[Mapping[str, Any]], float],
    shape: tuple[int, int] = GATE_UP,
) -> Iterator[float]:
    """``figure`` of what a model would run."""
    for row in found.get("linears", ()):
        same = (row["scheme"], tuple(row["shape"]), row["model"]) == (scheme, shape, "Llama-3-8B")
        if same and row["chosen"] and row["rows"] in rows:
            yield figure(row)


def _share(scheme: str, rows: Sequence[int], percent: float) -> Target:
    figures = partial(_linears, scheme=scheme, rows=rows, figure=itemgetter("percent"))
    return Target(f"{scheme}, {_text(rows)}: share of the bandwidth of a copy", percent, True, "%", figures)


def _faster(scheme: str, rows: Sequence[int], bound: float) -> Target:
    figures = partial(_linears, scheme=scheme, rows=rows, figure=itemgetter("speedup"))
    return Target(f"{scheme}, {_text(rows)}: bfloat16's time over its own", bound, True, "x", figures)


def _slower(scheme: str, rows: Sequence[int], bound: float) -> Target:
    figures = partial(_linears, scheme=scheme, rows=rows, figure=lambda row: 1 / row["speedup"])
    return Target(f"{scheme}, {_text(rows)}: its time over bfloat16's", bound, False, "x", figures)


def _text(rows: Sequence[int]) -> str:
    return f"{', '.join(map(str, rows))} row{'s' * (tuple(rows) != (1,))}"


def _kernels(found: Figures, kernel: str, against: str) -> Iterator[float]:
    """Ratios of ``activations`` at the rows of a prompt."""
    for row in found.get("activations", ()):
        if row["kernel"] == kernel and row["against"].startswith(against) and row["rows"] >= 2048:
            yield row["ratio"]


def _beside_gemlite(found: Figures) -> Iterator[float]:
    """gemlite's time over ours, of every layer that both were timed on."""
    seconds: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in found.get("gemlite", ()):
        if "seconds" in row:  # the note that it is not installed has none
            case = (tuple(row["shape"]), row["scheme"], row["rows"])
            seconds.setdefault(case, {})[row["implementation"]] = row["seconds"]
    both = (times for times in seconds.values() if {NAME, OURS} <= times.keys())
    return (times[NAME] / times[OURS] for times in both)


def _decoding(found: Figures) -> Iterator[float]:
    return (row["speedup"] for row in found.get("models", ()) if row["model"] == "W4A16G128")


def _errors(found: Figures) -> Iterator[float]:
    return (inf if isnan(row["error"]) else row["error"] for row in found.get("errors", ()))


_FEW, _MANY = (1, 4, 16), (512, 1024, 4096)

TARGETS = (
    Target("every kernel: relative error against float64", 0.02, False, "", _errors),
    _share("W4A16G128", _FEW, 70),
    Target("W4A16G128, 1, 4, 16 rows, 4096 x 4096: time", 5, False, "us",
           partial(_linears, scheme="W4A16G128", rows=_FEW, figure=lambda row: 1e6 * row["seconds"],
                   shape=(4096, 4096))),
    _share("W8A16", (1,), 65),
    _share("W2A16G128", (1,), 65),
    _faster("W4A16G128", (64,), 2),
    _slower("W4A16G128", (256,), 1.5),
    _slower("W4A16G128", (1024,), 1.3),
    _slower("W4A16G128", (4096,), 1.1),
    _faster("W8A8", _MANY, 1.6),
    _faster("W4A8", _MANY, 1.4),
    _faster("W4A8G128", _MANY, 1.4),
    Target("layers that gemlite takes, any number of rows: its time over ours", 1, True, "x", _beside_gemlite),
    Target("Kronecker product + quantise, 2048 rows: its time over that of the product it feeds", 0.1, False, "x",
           partial(_kernels, kernel="kronecker + quantise", against="product")),
    Target("norm + quantise, 2048 rows: its time over that of a copy", 1.3, False, "x",
           partial(_kernels, kernel="norm + quantise", against="copy")),
    Target("Llama-3-8B, W4A16G128, decoding: bfloat16's time over its own", 2.2, True, "x", _decoding),
)  # fmt: skip
