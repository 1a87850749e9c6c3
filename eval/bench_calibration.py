"""What calibration costs: seconds per block and peak memory of each method.

    python -m quantkit.eval.bench_calibration --model FOLDER --output eval/results/bench_calibration.json

Measured on the blocks of ``--model`` (repeatable) and on one random-weight block of the shape of Llama-3-8B (hidden
4096, intermediate 14336, 32 heads, 8 of keys and values) with 16 samples of 512 tokens. Each run is a process of its
own; a block's seconds are those of the run record, everything included. CPU seconds, of all threads together, say more
where the machine has other work to do.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.eval.bench_quantize import run_quantize, write_large_block
from quantkit.eval.environment import environment
from quantkit.eval.tables import markdown

METHODS = {
    "rtn": "W3A16G128",
    "sinq": "W3A16G128",
    "hqq": "W3A16G128",
    "gptq": "W3A16G128",
    "asinq": "W3A16G128",
    "awq": "W3A16G128",
    "awq+gptq": "W3A16G128",
    "rtn+norm-tweaking": "W3A16G128",
    "smoothquant": "W6A6",
    "os-plus": "W6A6",
}
"""Method -> the scheme it is timed with."""


def main(
    model: Annotated[list[str] | None, typer.Option(help="also measured; with its tokenizer; repeatable")] = None,
    method: Annotated[list[str] | None, typer.Option(help="of the table above; repeatable", show_default="all")] = None,
    nsamples: Annotated[int, typer.Option(help="calibration samples")] = 16,
    seqlen: Annotated[int, typer.Option(help="tokens of a sample")] = 512,
    large: Annotated[bool, typer.Option(help="measure the block of Llama-3-8B's shape")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
) -> None:
    """Print a table of seconds per block and peak memory."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = {Path(name).name: Path(name) for name in model or ()}
        if large:
            sources["Llama-3-8B block"] = write_large_block(folder / "large")
        for name, source in sources.items():
            for wanted in method or METHODS:
                flags = [f"--nsamples={nsamples}", f"--seqlen={seqlen}"]
                run = run_quantize(source, folder / "out", wanted, METHODS[wanted], flags)
                rows.append(
                    {
                        "model": name,
                        "method": wanted,
                        "scheme": METHODS[wanted],
                        "seconds_per_block": round(statistics.median(run["block_seconds"]), 2),
                        "cpu_seconds_per_block": round(statistics.median(run["block_cpu_seconds"]), 2),
                        "peak_rss_mb": round(run["peak_rss_bytes"] / 1e6, 1),
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    print(markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    if output:
        command = "python -m quantkit.eval.bench_calibration " + " ".join(sys.argv[1:])
        about = {"command": command, "environment": environment(), "threads": os.environ.get("OMP_NUM_THREADS", "all")}
        output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
