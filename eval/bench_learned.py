"""What learning costs and what it brings: the authors' recipe of a method against the recommended one.

    python -m quantkit.eval.bench_learned --model FOLDER --calibration FILE --output eval/results/bench_learned.json

Measured on the blocks of ``--model``, or with ``--large`` on one random-weight block of the shape of Llama-3-8B, where
few samples (``--nsamples 8``) tell what a step costs. Both recipes learn from the same samples and are judged by the
same held-out ones; a block's loss is the error of its output there, over the variance of the output. ``loss`` is that
of the state that is kept, the best one behind any epoch: the more epochs, the more it owes to the choice;
``loss_at_end`` is that of the last state. Seconds are CPU seconds of all threads, everything about the block included.
Each run is a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from quantkit.eval.bench_quantize import run_recipe, write_large_block
from quantkit.eval.environment import environment
from quantkit.eval.tables import markdown
from quantkit.formats.writer import RUN_RECORD, read_record

HOLDOUT = 0.1
"""Share of the samples that judge, in either recipe."""


def main(
    model: Annotated[Path | None, typer.Option(help="folder of the model")] = None,
    large: Annotated[bool, typer.Option("--large", help="the block of Llama-3-8B's shape in its place")] = False,
    calibration: Annotated[str, typer.Option(help="text to learn from, as for quantkit quantize")] = "demo",
    method: Annotated[list[str] | None, typer.Option(help="repeatable", show_default="flatquant")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="repeatable", show_default="all")] = None,
    scheme: Annotated[str, typer.Option(help="numbers as stored")] = "W4A4",
    nsamples: Annotated[int, typer.Option(help="calibration samples")] = 64,
    seqlen: Annotated[int, typer.Option(help="tokens of a sample")] = 256,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
) -> None:
    """Print a table of steps, seconds and losses."""
    if (model is None) != large:
        raise typer.BadParameter("give either --model FOLDER or --large")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = model or write_large_block(Path(scratch) / "large")
        for name in method or ("flatquant",):
            for kind in preset or ("faithful", "recommended"):
                recipe = {
                    "scheme": scheme,
                    "steps": [{"method": name, "options": {"preset": kind, "holdout": HOLDOUT}}, {"method": "rtn"}],
                    "calibration": {"source": calibration, "nsamples": nsamples, "seqlen": seqlen},
                }
                measured = _measure(source, recipe)
                rows.append({"model": source.name, "method": name, "recipe": kind, "scheme": scheme, **measured})
                print(rows[-1], file=sys.stderr, flush=True)
    print(markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    if output:
        command = "python -m quantkit.eval.bench_learned " + " ".join(sys.argv[1:])
        output.write_text(
            json.dumps({"command": command, "environment": environment(), "rows": rows}, indent=2) + "\n",
            encoding="utf-8",
        )


def _measure(model: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run = run_recipe(model, folder / "out", folder / "recipe.yaml")
        events = [event for event in read_record(folder / "out" / RUN_RECORD) if "block" in event]
    learned = [next(fact for fact in event["transforms"] if "learning" in fact) for event in events]
    return {
        "blocks": len(events),
        "steps_per_block": statistics.mean(fact["learning"]["steps"] for fact in learned),
        "cpu_seconds_per_block": round(statistics.median(run["block_cpu_seconds"]), 1),
        "peak_rss_mb": round(run["peak_rss_bytes"] / 1e6, 1),
        "loss_of_rounding": _geometric_mean([fact["loss_before"] for fact in learned]),
        "loss_at_start": _geometric_mean([fact["learning"]["holdout"][0] for fact in learned]),
        "loss_at_end": _geometric_mean([fact["learning"]["holdout"][-1] for fact in learned]),
        "loss": _geometric_mean([fact["loss"] for fact in learned]),
    }


def _geometric_mean(losses: list[float]) -> float:
    """Over blocks, whose losses may be orders of magnitude apart."""
    return float(f"{statistics.geometric_mean(losses):.4g}")


if __name__ == "__main__":
    typer.run(main)
