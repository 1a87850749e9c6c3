"""Markdown tables of what ``quantkit.eval.sweep`` measured.

    python -m quantkit.eval.tables eval/results/weights.jsonl --text novels
    python -m quantkit.eval.tables eval/results/weights.jsonl --text novels --against rtn

Without ``--against`` a cell is a perplexity and its change from the unquantised model's; with it, the change from
another method's at the same scheme, with the 95 % interval of a paired bootstrap over the windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.errors import RecipeError
from quantkit.eval.cells import AS_IT_CAME, Cell, read_cells

Cells = Mapping[Cell, Mapping[str, Any]]


def main(
    results: Annotated[list[Path], typer.Argument(help="files written by quantkit.eval.sweep")],
    text: Annotated[str, typer.Option(help="name of a text in them")],
    against: Annotated[str | None, typer.Option(help="method to compare the others with")] = None,
) -> None:
    """Print one table per model."""
    cells: dict[Cell, dict[str, Any]] = {}
    for path in results:
        cells |= read_cells(path)
    for model in dict.fromkeys(cell.model for cell in cells):
        print(f"### {model}, {text}\n\n{model_table(cells, model, text, against)}\n")


def model_table(cells: Cells, model: str, text: str, against: str | None = None) -> str:
    """Methods down, schemes across.

    Raises:
        RecipeError: the unquantised model, or what to compare with, was not measured.
    """
    own = {cell: line for cell, line in cells.items() if cell.model == model and cell.method != AS_IT_CAME}
    methods = list(dict.fromkeys(cell.method for cell in own))
    schemes = list(dict.fromkeys(cell.scheme for cell in own))
    if against is not None and against not in methods:
        raise RecipeError(f"method '{against}' was not measured on {model}; measured: {', '.join(methods)}.")
    before = _of(cells, Cell(model, AS_IT_CAME, ""), text)
    if before is None:
        raise RecipeError(f"{model} was not measured unquantised on '{text}'.")
    rows = [
        [method, *(_cell(cells, Cell(model, method, scheme), text, before, against) for scheme in schemes)]
        for method in methods
        if method != against
    ]
    heading = [f"method (unquantised: {before['perplexity']:.2f})", *schemes]
    return markdown([heading, *rows])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is the heading, padded so that it reads well as text."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_row(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _of(cells: Cells, cell: Cell, text: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = cells.get(cell, {}).get("texts", {}).get(text)
    return found


def _cell(cells: Cells, cell: Cell, text: str, before: Mapping[str, Any], against: str | None) -> str:
    found = _of(cells, cell, text)
    if found is None:
        return "failed" if "error" in cells.get(cell, {}) else ""
    if against is None:
        return f"{found['perplexity']:.2f} ({found['perplexity'] / before['perplexity'] - 1:+.1%})"
    import torch

    from quantkit.eval.paired import perplexity_ratio

    other = _of(cells, cell._replace(method=against), text)
    if other is None:
        return ""
    ratio = perplexity_ratio(torch.tensor(found["nll"]), torch.tensor(other["nll"]))
    return f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"


if __name__ == "__main__":
    typer.run(main)
