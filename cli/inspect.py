"""``quantkit inspect``: what a quantised checkpoint holds, layer by layer, and what will run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import print_json, size, table
from quantkit.cli.report import LayersOption, TokensOption

if TYPE_CHECKING:
    from quantkit.formats.inspect import LayerReport

EXAMPLES = """Examples:

quantkit inspect out

quantkit inspect out --sort error --json

quantkit inspect out --blocks

quantkit inspect out --kernels

quantkit inspect demo --activations --report flatness.html
"""

ROWS = (1, 16, 256)
"""Rows of x that ``--kernels`` asks about: one token, a few, a prompt."""


def inspect(
    folder: Annotated[
        str,
        typer.Argument(help="folder written by `quantkit quantize`; with --activations any model, hub id, or 'demo'"),
    ],
    sort: Annotated[str, typer.Option(help="model (order in the model), error (worst first) or size")] = "model",
    blocks: Annotated[
        bool, typer.Option("--blocks", help="per block of the run instead: time, memory, losses")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="instead: which implementation runs each layer on this machine, and why")
    ] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="instead: what enters linears on a text, how far from flat it is")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--report", help="with --activations: HTML file for pictures of it")
    ] = None,
    text: Annotated[str, typer.Option(help="with --activations: demo, wikitext2, a file ...")] = "demo",
    layers: LayersOption = None,
    tokens: TokensOption = 512,
    device: Annotated[
        str, typer.Option(help="with --kernels, --activations: auto, cpu, cuda ...; auto: a GPU, else cpu")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Per-layer table of a quantised checkpoint: scheme, bits per weight as stored, size, weight error."""
    if activations:
        from quantkit.cli.report import activations as show_activations

        show_activations(folder, page, layers or (), text, tokens, device)
        return
    if page is not None or layers:
        raise typer.BadParameter("goes with --activations", param_hint="--report" if page is not None else "--layers")
    from quantkit.formats.inspect import inspect_checkpoint
    from quantkit.formats.summary import block_events, block_rows, summarise

    if sort not in ("model", "error", "size"):
        raise typer.BadParameter(f"'{sort}' is not one of model, error, size", param_hint="--sort")
    report = inspect_checkpoint(Path(folder))
    events = block_events(report.record)
    linears = list(report.layers)
    if sort == "error":
        linears.sort(key=lambda layer: -(layer.error or 0))
    elif sort == "size":
        linears.sort(key=lambda layer: -layer.stored_bytes)
    if kernels:
        _print_kernels(linears, device, as_json)
        return
    if as_json:
        rows = [
            {
                "name": layer.name,
                "shape": [layer.out_features, layer.in_features],
                "format": layer.format.model_dump(mode="json"),
                "bits_per_weight": layer.bits_per_weight,
                "bytes": layer.stored_bytes,
                "online_operations": layer.online_operations,
                "error": layer.error,
            }
            for layer in linears
        ]
        summary = {
            "quant_method": report.method,
            "bits_per_weight": report.bits_per_weight,
            "bytes": report.total_bytes,
            "online_share": report.online_share,
            "kv_cache": None if report.kv is None else report.kv.model_dump(mode="json"),
            "blocks": [{key: value for key, value in event.items() if key != "layers"} for event in events],
        }
        print_json(summary | {"layers": rows})
        return
    if blocks:
        heads, rows_of_blocks = block_rows(report.record)
        table(heads, rows_of_blocks, right=heads[:4])
        return
    table(
        ["layer", "out x in", "stored as", "bits/weight", "size", "weight error"],
        [
            [
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                layer.format.describe(),
                f"{layer.bits_per_weight:.3f}",
                size(layer.stored_bytes),
                "-" if layer.error is None else f"{layer.error:.2%}",
            ]
            for layer in linears
        ],
        right=("bits/weight", "size", "weight error"),
    )
    print(
        f"{len(linears)} quantised linears ({report.method}) at {report.bits_per_weight:.3f} bits per weight; "
        f"checkpoint {size(report.total_bytes)}"
    )
    if report.online_share:
        print(f"multiplying inputs by matrices at run time adds {report.online_share:.1%} to the linears' operations")
    if report.kv is not None:
        print(f"keys and values in the cache: {report.kv.describe()}")
    for line in summarise(report.record):
        print(line)


def _print_kernels(layers: Sequence[LayerReport], device: str, as_json: bool) -> None:
    """For each layer the implementations for 1, 16 and 256 rows; then what was passed over, and why."""
    import torch

    from quantkit.cli.loaded import one_device
    from quantkit.kernels.dispatch import explain
    from quantkit.layers.quant_linear import QuantLinear

    where = torch.device(one_device(device))
    chosen: list[list[str]] = []
    reasons: list[dict[str, str]] = []
    for layer in layers:
        empty = QuantLinear(layer.in_features, layer.out_features, False, layer.format, layer.dtype, device="meta")
        found = [explain(empty, where, rows) for rows in ROWS]
        chosen.append([row.name for row, _ in found])
        # What takes the layer for one of these numbers of rows is no news as passed over for another.
        reasons.append({n: why for _, against in found for n, why in against.items() if n not in chosen[-1]})
    if as_json:
        print_json(
            {
                "device": str(where),
                "layers": [
                    {"name": layer.name, "runs": dict(zip(map(str, ROWS), names, strict=True)), "passed_over": why}
                    for layer, names, why in zip(layers, chosen, reasons, strict=True)
                ],
            }
        )
        return
    table(
        ["layer", "out x in", "stored as", *(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS)],
        [
            [layer.name, f"{layer.out_features} x {layer.in_features}", layer.format.describe(), *names]
            for layer, names in zip(layers, chosen, strict=True)
        ],
    )
    passed_over = Counter((name, why) for layer in reasons for name, why in layer.items())
    print(f"on {where}; passed over:" if passed_over else f"on {where}; nothing was passed over")
    for (name, why), count in passed_over.items():
        print(f"  {name}: {why} ({count} of {len(layers)} layers)")
