"""``quantkit bench``: what things cost on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Progress, say, table
from quantkit.cli.loaded import Dtype

app = typer.Typer(no_args_is_help=True, help="Measure on this machine: kernels.", rich_markup_mode="markdown")

EXAMPLES = """Examples:

quantkit bench kernels

quantkit bench kernels --shapes 4096x4096,4096x14336 --rows 1,8,128 --schemes W4A16G128,W8A16,W8A8 --json kernels.json
"""


@app.command("kernels", epilog=EXAMPLES)
def kernels(
    rows: Annotated[str, typer.Option(help="rows of x (tokens of a forward pass)")] = "1,16,256",
    shapes: Annotated[str, typer.Option(help="OUTxIN of the weight")] = "4096x4096",
    schemes: Annotated[str, typer.Option(help="as in `quantkit quantize`")] = "W4A16G128,W8A16,W8A8",
    dtype: Annotated[Dtype, typer.Option(help="of x, scales and the dense weight; auto: bfloat16")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...; auto: the first GPU, else cpu")] = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="timed calls of each")] = 30,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="last cache of the device: weights are rotated past it; 0: one copy of each")
    ] = 64,
    out: Annotated[Path | None, typer.Option("--json", help="file for the figures, versions and machine")] = None,
) -> None:
    """Every implementation that takes a layer against the dense product, interleaved in one run, random weights.

    Prints medians of one call and how many times as fast as the dense product it is; `*` is what a model would use.
    """
    import json

    import torch

    from quantkit.cli.loaded import one_device
    from quantkit.eval import bench_kernels as bench
    from quantkit.eval.environment import environment

    wanted, formats, counts = bench.parse_shapes(shapes), bench.parse_schemes(schemes), bench.parse_rows(rows)
    where = torch.device(one_device(device))
    numbers = torch.bfloat16 if dtype is Dtype.auto else getattr(torch, dtype.value)
    lines: list[bench.Row] = []
    with Progress() as progress:
        total = len(wanted) * len(formats) * len(counts)
        measured = bench.bench(wanted, formats, counts, numbers, where, rounds=rounds, cache_bytes=cache_mb * 2**20)
        for done, case in enumerate(measured, start=1):
            lines += case
            progress.update("timing", done, total, f"{case[0].case.scheme} {case[0].case.rows} rows")
    numeric = ("rows", "us", "p20", "p80", "x dense")
    table(
        ["out x in", "scheme", "rows", "implementation", "us", "p20", "p80", "x dense"],
        [
            [
                f"{line.case.out_features} x {line.case.in_features}",
                line.case.scheme,
                str(line.case.rows),
                line.name + " *" * line.chosen,
                *(f"{seconds * 1e6:.1f}" for seconds in (line.seconds, line.p20, line.p80)),
                f"{line.speedup:.2f}",
            ]
            for line in lines
        ],
        right=numeric,
    )
    if out is not None:
        about = {
            "command": "quantkit " + " ".join(sys.argv[1:]),
            "environment": environment(),
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(numbers).removeprefix("torch."),
        }
        out.write_text(json.dumps({**about, "rows": bench.report(lines)}, indent=2) + "\n", encoding="utf-8")
        say(f"figures are in {out}")
