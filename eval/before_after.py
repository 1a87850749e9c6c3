"""Perplexity before and after quantising, every step through the command line in a process of its own.

    python -m quantkit.eval.before_after demo --text demo --method rtn --method sinq --scheme W3A16G64

Quantising, reloading and measuring share nothing but the checkpoint on disk, so what the table says is what a user
gets. The table is Markdown; the README's is this one.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.errors import RecipeError, did_you_mean
from quantkit.eval.environment import environment
from quantkit.eval.tables import markdown

METHODS = ["rtn", "sinq", "sinq+gptq"]
SCHEMES = ["W4A16G64", "W3A16G64", "W2A16G64"]
DTYPE = "float32"
"""Arithmetic of the measurements: in bfloat16 the noise, about 0.02 %, would hide small differences."""
BATCH_SIZE = 8
"""Windows per forward pass: packed weights are unpacked once for all of them."""


@dataclass(frozen=True)
class Row:
    """One model as it was measured."""

    method: str
    scheme: str
    bits_per_weight: float | None
    """Stored bits per quantised weight, scales included; None for the model as it came."""
    checkpoint_bytes: int
    format: str
    """compressed-tensors, quantkit, or nothing for the model as it came."""
    perplexity: dict[str, float]
    """By name of the text."""


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="hub id, local folder, or 'demo'")],
    text: Annotated[list[str], typer.Option(help="as `quantkit eval --ppl`; repeatable")],
    method: Annotated[list[str] | None, typer.Option(help="repeatable", show_default=", ".join(METHODS))] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="repeatable", show_default=", ".join(SCHEMES))] = None,
    seqlen: Annotated[int | None, typer.Option(help="as `quantkit eval`")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="as `quantkit eval`")] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(help="first make a copy that is harder to quantise: spread, outliers; repeatable"),
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="folder for the checkpoints; not given: they are deleted")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
) -> None:
    """Quantise MODEL by each method at each scheme, reload each result, print perplexities beside the original's."""
    measure = [f"--ppl={name}" for name in text]
    measure += [f"--dtype={DTYPE}", f"--batch-size={BATCH_SIZE}"]
    measure += [f"--seqlen={seqlen}"] if seqlen else []
    measure += [f"--max-tokens={max_tokens}"] if max_tokens else []
    started = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = _harder(model, edit, Path(scratch) / "source") if edit else model
        before = _perplexity(model, measure)
        for wanted in scheme or SCHEMES:
            for name in method or METHODS:
                folder = (keep or Path(scratch)) / f"{name}-{wanted}"
                flags = [f"--method={name}", f"--scheme={wanted}", f"--output={folder}", "--overwrite"]
                run = _quantkit("quantize", model, *flags)
                after = _perplexity(str(folder), measure)
                rows.append(Row(name, wanted, run["bits_per_weight"], run["output_bytes"], run["format"], after))
    original = Row("as it came", "", None, run["source_bytes"], "", before)
    print(markdown_table(original, rows))
    seconds = time.perf_counter() - started
    print(f"\n{len(rows)} checkpoints in {seconds:.0f} s; each was saved, then loaded and measured in a new process.")
    if output:
        command = "python -m quantkit.eval.before_after " + " ".join(sys.argv[1:])
        report = {"command": command, "environment": environment(), "rows": [vars(row) for row in (original, *rows)]}
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _harder(model: str, edits: Sequence[str], folder: Path) -> str:
    """A copy of ``model`` in ``folder`` that computes the same and is harder to quantise."""
    from quantkit.eval.injectors import EDITS, inject
    from quantkit.models.source import resolve

    unknown = [name for name in edits if name not in EDITS]
    if unknown:
        raise RecipeError(f"unknown edit '{unknown[0]}'. {did_you_mean(unknown[0], EDITS)}")
    return str(inject(resolve(model), folder, [EDITS[name] for name in edits]))


def _perplexity(model: str, measure: Sequence[str]) -> dict[str, float]:
    results = _quantkit("eval", model, *measure)["perplexity"]
    return {name: math.inf if result["value"] is None else result["value"] for name, result in results.items()}


def _quantkit(*arguments: str) -> Any:
    """Run ``quantkit ARGUMENTS --json`` in a new process; its error ends this one with the same status."""
    print("quantkit", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "quantkit.cli.main", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def markdown_table(original: Row, rows: Sequence[Row]) -> str:
    """``original`` and then one line per row, perplexities with their change against it."""
    texts = list(original.perplexity)
    lines = [
        ["method", "scheme", "bits per weight", "format", "checkpoint", *(f"perplexity, {name}" for name in texts)],
    ]
    for row in (original, *rows):
        numbers = [f"{row.perplexity[name]:.2f}" for name in texts]
        if row is not original:
            changes = [row.perplexity[name] / original.perplexity[name] - 1 for name in texts]
            numbers = [f"{number} ({change:+.1%})" for number, change in zip(numbers, changes, strict=True)]
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        lines.append([row.method, row.scheme, bits, row.format, f"{row.checkpoint_bytes / 1e6:.2f} MB", *numbers])
    return markdown(lines)


if __name__ == "__main__":
    typer.run(main)
