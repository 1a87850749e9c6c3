"""Figures that need a GPU, by one command. It has not run on one yet, so how long it takes is not known:

    python -m quantkit.eval.bench_gpu --output eval/results/gpu

writes ``gpu.json`` (after every part, so that what was measured is kept) and ``gpu.md``. Parts:

    bandwidth   of a large copy: what kernels that read weights are measured by
    errors      every kernel against float64, on sizes that are no multiple of any tile
    linears     layers of Llama-3-8B, Llama-3-70B and Qwen3-0.6B against the dense product in the same run, inside CUDA
                graphs, each call with weights that are not in the cache; percent: packed bytes per time, of bandwidth
    models      Llama-3-8B with random weights: decoding and a prompt, against bfloat16

Kernels of activations are timed as parts of linears and models only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from quantkit.eval import bench_decode, bench_kernels
from quantkit.eval.environment import environment
from quantkit.eval.harness import compare
from quantkit.eval.tables import markdown
from quantkit.formats.layer import stored_bytes
from quantkit.kernels import dispatch

SHAPES = {
    "Llama-3-8B": "6144x4096,4096x4096,28672x4096,4096x14336",
    "Llama-3-70B": "10240x8192,8192x8192,57344x8192,8192x28672",
    "Qwen3-0.6B": "4096x1024,1024x2048,6144x1024,1024x3072",
}
"""q, k and v together; o; gate and up together; down."""
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SCHEMES = "W4A16G128,W8A16,W2A16G128,W3A16G128,WNF4A16G64,W8A8,W4A8G128,W4A4"
ONLY_ON = {"Llama-3-70B": "W4A16G128,W8A8", "Qwen3-0.6B": "W4A16G128,W8A8"}
"""Schemes of models that are not measured in all of ``SCHEMES``."""
AWKWARD = ((300, 520), (1000, 1048))
TOLERANCE = 2e-2
"""Of bfloat16 outputs, relative to the norm."""

Part = Callable[[torch.device], list[dict[str, Any]]]


def main(
    output: Annotated[Path, typer.Option(help="folder for gpu.json and gpu.md")] = Path("eval/results/gpu"),
    part: Annotated[list[str] | None, typer.Option(help="repeatable", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1 ...")] = "cuda",
    minutes: Annotated[float, typer.Option(help="no further case of linears begins after this")] = 5.0,
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
    }
    output.mkdir(parents=True, exist_ok=True)
    for name in part or PARTS:
        started = time.perf_counter()
        rows = linears(where, minutes) if name == "linears" else PARTS[name](where)
        found[name] = rows
        (output / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(page(found), encoding="utf-8")
        print(f"{name}: {len(rows)} figures in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def bandwidth(device: torch.device) -> list[dict[str, Any]]:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = compare({"copy": lambda _: target.copy_(source)}, device)["copy"].median
    return [{"bytes_per_second": 2 * source.nbytes / seconds}]


def errors(device: torch.device) -> list[dict[str, Any]]:
    """Relative errors, Frobenius norm, of every kernel that takes a layer."""
    schemes = bench_kernels.parse_schemes(SCHEMES)
    return [line for name, wanted in schemes.items() for line in _errors(name, wanted, device)]


def _errors(name: str, wanted: bench_kernels.Wanted, device: torch.device) -> Iterator[dict[str, Any]]:
    for shape in AWKWARD:
        layer = bench_kernels.random_layer(wanted, *shape, torch.bfloat16, device)
        weight = layer.double().dequantize()
        layer = layer.bfloat16()
        for row in dispatch.IMPLEMENTATIONS:
            if row.refuses(layer, device) is not None:
                continue
            packed = row.layout.pack(layer) if row.layout else None
            for count in (1, 5, 16, 33, 65, 300):
                if count not in row.rows:
                    continue
                x = torch.randn(count, shape[1], dtype=torch.bfloat16, device=device)
                want = F.linear(layer.changed_input(x).double(), weight)
                error = float((row.run(x, layer, packed).double() - want).norm() / want.norm())
                yield {
                    "scheme": name,
                    "shape": shape,
                    "rows": count,
                    "implementation": row.name,
                    "error": error,
                    "right": error < TOLERANCE,
                }


def linears(device: torch.device, minutes: float) -> list[dict[str, Any]]:
    """Medians, speed against the dense product, and the share of the bandwidth."""
    speed = bandwidth(device)[0]["bytes_per_second"]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    lines, started = [], time.perf_counter()
    for model, shapes in SHAPES.items():
        schemes = bench_kernels.parse_schemes(ONLY_ON.get(model, SCHEMES))
        cases = bench_kernels.bench(
            bench_kernels.parse_shapes(shapes), schemes, ROWS, torch.bfloat16, device,
            rounds=10, cache_bytes=cache, graph_calls=24, without_reference=True,
        )  # fmt: skip
        for case in cases:
            layer = schemes[case[0].case.scheme].layer
            nbytes = stored_bytes(layer, case[0].case.out_features, case[0].case.in_features, torch.bfloat16)
            for line in bench_kernels.report(case):
                dense = line["implementation"] == bench_kernels.DENSE
                read = 2 * line["shape"][0] * line["shape"][1] if dense else nbytes
                lines.append({"model": model, **line, "percent": 100 * read / line["seconds"] / speed})
            if time.perf_counter() - started > 60 * minutes:
                return lines
    return lines


def models(device: torch.device) -> list[dict[str, Any]]:
    """Decoding at batch 1 and a prompt of 2,048 tokens."""
    lines = []
    for schemes in ("W4A16G128", "W8A8", "W4A4+kronecker"):  # two models in memory at a time
        rows = bench_decode.bench(
            "llama-3-8b", bench_kernels.parse_schemes(schemes), torch.bfloat16, device,
            prompt=128, tokens=32, prefill=2048, rounds=5,
        )  # fmt: skip
        lines += [line | {"against": schemes} for line in bench_decode.report(rows, 1)]
        del rows
        torch.cuda.empty_cache()
    return lines


PARTS: dict[str, Part] = {
    "bandwidth": bandwidth,
    "errors": errors,
    "linears": lambda device: linears(device, 5.0),
    "models": models,
}


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    versions = f"torch {found['environment']['torch']}, {found['cuda']}"
    text = [f"# {found['device']}", "", f"`{found['command']}`; {versions}.", ""]
    for name in (part for part in PARTS if found.get(part)):
        rows = [_flat(row) for row in found[name]]
        text += [f"## {name}", "", markdown([list(rows[0]), *(list(row.values()) for row in rows)]), ""]
    return "\n".join(text)


def _flat(row: dict[str, Any]) -> dict[str, str]:
    """Cells of one level; times in microseconds."""
    cells: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{key} {inner}": cell for inner, cell in _flat(value).items()}
        elif isinstance(value, list | tuple):
            cells[key] = " x ".join(str(part) for part in value)
        elif key in ("seconds", "median", "p20", "p80"):
            cells[f"{key} us"] = f"{value * 1e6:.1f}"
        else:
            cells[key] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return cells


if __name__ == "__main__":
    typer.run(main)
