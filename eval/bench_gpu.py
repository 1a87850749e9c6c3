"""Figures that need a GPU, by one command, in less than 8 minutes; what was aimed at, and whether it was reached:

    python -m quantkit.eval.bench_gpu --output eval/results/gpu

writes ``gpu.json`` and ``gpu.md`` after every part. Parts (``bench_gpu_parts.py``):

    bandwidth    of a large copy: what kernels that read weights are measured by
    errors       every kernel against float64, on sizes that are no multiple of any tile
    linears      layers of Llama-3-8B, Qwen3-0.6B and Llama-3-70B against the dense product in the same run, inside CUDA
                 graphs, each call with weights that are not in the cache; percent: packed bytes per time, of bandwidth
    activations  what is done to inputs, against a copy of the same bytes, or the product that it feeds
    attention    decoding from a quantised cache
    models       Llama-3-8B with random weights: decoding and a prompt, against bfloat16
    gemlite      another library's kernels on the same layers, where it is installed

A part runs in a process of its own, or in several at once: a kernel that breaks the GPU's state, or never ends, takes
no other part's figures with it. What it had found is kept, and why it stopped is written beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quantkit.eval.bench_gpu_parts import PARTS, Rows
from quantkit.eval.bench_gpu_targets import judged
from quantkit.eval.environment import environment
from quantkit.eval.tables import markdown

_LEAST_SECONDS = 30.0
"""What a part is given at least: most of it is spent on imports."""
_SOFT = 0.8
"""Of a part's time, after which it begins nothing new; imports come before that."""
_WAIT = 0.05
"""Seconds between two looks at what runs."""


def main(
    output: Annotated[Path, typer.Option(help="folder for gpu.json and gpu.md")] = Path("eval/results/gpu"),
    part: Annotated[list[str] | None, typer.Option(help="repeatable", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1 ...")] = "cuda",
    minutes: Annotated[float, typer.Option(help="of all parts together")] = 7.5,
) -> None:
    """Measure, and write both files."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: this command is for machines that have one.")
    unknown = set(part or ()) - PARTS.keys()
    if unknown:
        raise typer.BadParameter(f"no part '{min(unknown)}'; there are {', '.join(PARTS)}")
    where = torch.device(device)
    found: dict[str, Any] = {
        "command": "python -m quantkit.eval.bench_gpu " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "device": torch.cuda.get_device_name(where),
        "cuda": torch.version.cuda or torch.version.hip,
        "parts": {},
        "failed": [],
    }
    measure(found, part or list(PARTS), device, 60 * minutes, output)


def measure(found: dict[str, Any], names: list[str], device: str, seconds: float, output: Path) -> None:
    """Run the parts ``names`` one after another and add their rows to ``found``, which is written after each.

    Each may take its share of what is left of ``seconds``: the time that one does not need is the next ones'.
    """
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for place, name in enumerate(names):
        started = time.monotonic()
        shares = [PARTS[other].share for other in names[place:]]
        limit = max(_LEAST_SECONDS, (end - started) * shares[0] / sum(shares))
        rows, failed = run(name, device, limit)
        found["parts"][name] = rows
        found["failed"] += failed
        found["targets"] = judged(found["parts"])
        (output / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(page(found), encoding="utf-8")
        took = f"{name}: {len(rows)} figures in {time.monotonic() - started:.0f} s"
        print(took + "".join(f"; {one['which']} {one['why']}" for one in failed), file=sys.stderr, flush=True)


def run(name: str, device: str, limit: float) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rows of a part, from a process for each of ``Part.over``, all at once; and what of it failed, and why.

    Processes are ended after ``limit`` seconds.
    """
    rows: list[dict[str, Any]] = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(number)) for number in range(len(PARTS[name].over))]
        running = []
        for which, file in zip(PARTS[name].over, files, strict=True):
            arguments = [name, which, device, str(_SOFT * limit), str(file)]
            with file.with_suffix(".errors").open("w") as errors:
                command = [sys.executable, "-m", "quantkit.eval.bench_gpu_parts", *arguments]
                running.append(subprocess.Popen(command, stderr=errors, stdout=errors))
        end = time.monotonic() + limit
        for which, file, process in zip(PARTS[name].over, files, running, strict=True):
            try:
                code = process.wait(max(_WAIT, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            for row in _read(file):
                if "failed" in row:
                    failed.append({"part": name, "which": row["failed"], "why": row["why"]})
                else:
                    rows.append(row)
            if code != 0:
                failed.append({"part": name, "which": which, "why": _why(code, limit, file.with_suffix(".errors"))})
    return rows, failed


def _read(file: Path) -> Rows:
    """The rows that a process wrote; the last line may have been cut off."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _why(code: int | None, limit: float, errors: Path) -> str:
    """In one line, why a process did not come to its end."""
    if code is None:
        return f"was stopped after {limit:.0f} s"
    said = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    print("\n".join(said[-25:]), file=sys.stderr)
    return f"ended with status {code}: {said[-1].strip()[:300] if said else 'nothing was said'}"


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    versions = f"torch {found['environment']['torch']}, {found['cuda']}"
    text = [f"# {found['device']}", "", f"`{found['command']}`; {versions}.", ""]
    sections = {"targets": found["targets"], "failed": found["failed"], **found["parts"]}
    for name, rows in ((name, [_flat(row) for row in rows]) for name, rows in sections.items() if rows):
        heading = list(dict.fromkeys(key for row in rows for key in row))
        text += [f"## {name}", "", markdown([heading, *([row.get(key, "") for key in heading] for row in rows)]), ""]
    return "\n".join(text)


def _flat(row: dict[str, Any]) -> dict[str, str]:
    """Cells of one level; times in microseconds."""
    cells: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{key} {inner}": cell for inner, cell in _flat(value).items()}
        elif isinstance(value, list | tuple):
            cells[key] = " x ".join(str(part) for part in value)
        elif key.endswith("seconds") or key in ("median", "p20", "p80"):
            cells[f"{key} us"] = f"{value * 1e6:.1f}"
        else:
            cells[key] = f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
    return cells


if __name__ == "__main__":
    typer.run(main)
