"""``quantkit bench``: what things cost on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.console import Progress, say, table
from quantkit.cli.loaded import Dtype, FirstDeviceOption, TrustOption

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True, help="Measure on this machine: kernels, whole models, caches.", rich_markup_mode="markdown"
)

BatchOption = Annotated[int, typer.Option(min=1, help="sequences at a time")]
FileOption = Annotated[Path | None, typer.Option("--json", help="file for the figures, versions and machine")]

KERNELS = """Examples:

quantkit bench kernels

quantkit bench kernels --shapes 4096x4096,4096x14336 --rows 1,8,128 --schemes W4A16G128,W8A16,W8A8 --json kernels.json
"""

DECODE = """Examples:

quantkit bench decode llama-1b

quantkit bench decode out --tokens 32 --prefill 512 --json decode.json

quantkit bench decode meta-llama/Llama-3.1-8B --schemes W4A16G128,W8A8 --device cuda
"""

KV = """Examples:

quantkit bench kv llama-3-8b

quantkit bench kv llama-3-8b llama-1b --kv int8,kivi-2bit,nsnquant-1bit --context 1024,16384 --rounds 0

quantkit bench kv meta-llama/Llama-3.1-8B --context 32768 --batch 8 --device cuda --json kv.json
"""


@app.command("kernels", epilog=KERNELS)
def kernels(
    rows: Annotated[str, typer.Option(help="rows of x (tokens of a forward pass)")] = "1,16,256",
    shapes: Annotated[str, typer.Option(help="OUTxIN of the weight")] = "4096x4096",
    schemes: Annotated[
        str, typer.Option(help="as in `quantkit quantize`; +kronecker, +hadamard behind one: the input is multiplied")
    ] = "W4A16G128,W8A16,W8A8",
    dtype: Annotated[Dtype, typer.Option(help="of x, scales and the dense weight; auto: bfloat16")] = Dtype.auto,
    device: FirstDeviceOption = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="timed calls of each")] = 30,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="last cache of the device: weights are rotated past it; 0: one copy of each")
    ] = 64,
    out: FileOption = None,
) -> None:
    """Every implementation that takes a layer against the dense product, interleaved in one run, random weights.

    Prints medians of one call and how many times as fast as the dense product it is; `*` is what a model would use.
    """
    from quantkit.eval import bench_kernels as bench

    wanted, formats, counts = bench.parse_shapes(shapes), bench.parse_schemes(schemes), bench.parse_rows(rows)
    where, numbers = _where_and_in(device, dtype)
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
        _write(out, where, numbers, bench.report(lines))


@app.command("decode", epilog=DECODE)
def decode(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="quantised folder; any other model, folder or hub id, for its shape; llama-1b; llama-3-8b",
        ),
    ],
    schemes: Annotated[
        str, typer.Option(help="what the blocks become, as for kernels; a quantised folder is what it is")
    ] = "W4A16G128",
    dtype: Annotated[Dtype, typer.Option(help="of activations, scales and dense weights; auto: bfloat16")] = Dtype.auto,
    device: FirstDeviceOption = "auto",
    prompt: Annotated[int, typer.Option(min=2, help="tokens before the first that is timed")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="tokens that are decoded in a round")] = 16,
    prefill: Annotated[int, typer.Option(min=0, help="time a prompt of so many tokens as well")] = 0,
    batch: BatchOption = 1,
    rounds: Annotated[int, typer.Option(min=3, help="timed rounds of each")] = 10,
    trust_remote_code: TrustOption = False,
    out: FileOption = None,
) -> None:
    """A whole model, dense and quantised, in turns in one run: speed of decoding and of a prompt, and memory.

    Weights are random, those of a quantised folder aside: the time does not depend on them.
    """
    from quantkit.cli.console import quiet_libraries, size
    from quantkit.eval import bench_decode as bench
    from quantkit.eval.bench_kernels import parse_schemes

    quiet_libraries()
    (where, numbers), formats = _where_and_in(device, dtype), parse_schemes(schemes)
    lines = bench.bench(
        model, formats, numbers, where, prompt=prompt, tokens=tokens, prefill=prefill, batch=batch, rounds=rounds,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    header = ["model", "tokens/s", "ms/token", "p20", "p80", "x dense", "weights"]
    header += ["resident"] * (lines[0].resident_bytes is not None) + ["prompt ms", "x dense "] * bool(prefill)
    shown = []
    for line in lines:
        t = line.decode
        cells = [line.name, f"{batch / t.median:.2f}", *(f"{1000 * s:.2f}" for s in (t.median, t.p20, t.p80))]
        cells += [f"{line.speedup:.2f}", size(line.weight_bytes)]
        cells += [size(line.resident_bytes)] if line.resident_bytes is not None else []
        cells += [f"{1000 * line.prefill.median:.1f}", f"{line.prefill_speedup:.2f}"] if line.prefill else []
        shown.append(cells)
    table(header, shown, right=tuple(header[1:]))
    if out is not None:
        _write(out, where, numbers, bench.report(lines, batch))


@app.command("kv", epilog=KV)
def kv(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="folder or hub id, for its shape; llama-1b; llama-3-8b")
    ],
    names: Annotated[
        str, typer.Option("--kv", metavar="NAMES", help="caches of `quantkit methods`, with commas between")
    ] = "int8,kivi-2bit,nsnquant-2bit",
    context: Annotated[str, typer.Option(help="tokens in the cache, with commas between")] = "4096",
    batch: BatchOption = 1,
    attention: Annotated[
        str, typer.Option(help="packed: the cache is read block by block; dense: all of it for each token")
    ] = "packed,dense",
    dtype: Annotated[Dtype, typer.Option(help="of what comes in, and of full precision; auto: bfloat16")] = Dtype.auto,
    device: FirstDeviceOption = "auto",
    rounds: Annotated[int, typer.Option(min=0, help="timed calls of each, at least 3; 0: bytes alone")] = 5,
    trust_remote_code: TrustOption = False,
    out: FileOption = None,
) -> None:
    """What the keys and values of one layer take, and cost, against full precision, in turns in one run.

    Prints measured bytes of a layer, how many times smaller that is, and medians: of a decoding step of all sequences
    (one token comes in, attention reads all), and of taking in one token of a prompt. No model is run.
    """
    from quantkit.cli.console import quiet_libraries, size
    from quantkit.eval import bench_kv as bench

    quiet_libraries()
    wanted, contexts, ways = bench.parse_names(names), bench.parse_contexts(context), bench.parse_attentions(attention)
    where, numbers = _where_and_in(device, dtype)
    lines: list[bench.Row] = []
    with Progress() as progress:
        for done, (model, tokens) in enumerate(((m, c) for m in models for c in contexts), start=1):
            lines += bench.bench(
                model, wanted, tokens, numbers, where, attentions=ways, batch=batch, rounds=rounds,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            progress.update("timing", done, len(models) * len(contexts), f"{model}, {tokens} tokens")
    header = ["model", "tokens", "cache", "bytes", "bits", "x smaller"]
    header += ["attention", "step ms", "p20", "p80", "x full", "encode us"] if rounds else []
    shown = []
    for line in lines:
        cells = [line.model, str(line.context), line.kv, size(line.bytes), f"{line.bits_per_element:.3f}"]
        cells.append(f"{line.times_smaller:.2f}")
        if line.decode and line.encode and line.decode_ratio:
            t = line.decode
            cells += [line.attention, *(f"{1000 * s:.2f}" for s in (t.median, t.p20, t.p80))]
            cells += [f"{line.decode_ratio:.3f}", f"{1e6 * line.encode.median:.2f}"]
        if rounds or cells not in shown:
            shown.append(cells)
    table(header, shown, right=tuple(name for name in header if name not in ("model", "cache", "attention")))
    if out is not None:
        _write(out, where, numbers, bench.report(lines))


def _where_and_in(device: str, dtype: Dtype) -> tuple[torch.device, torch.dtype]:
    """What the options stand for.

    Raises:
        RecipeError: no such device.
    """
    import torch

    from quantkit.cli.loaded import one_device

    return torch.device(one_device(device)), torch.bfloat16 if dtype is Dtype.auto else getattr(torch, dtype.value)


def _write(out: Path, device: torch.device, dtype: torch.dtype, rows: list[dict[str, Any]]) -> None:
    """The figures, and what they were measured with."""
    import json

    import torch

    from quantkit.eval.environment import environment

    about = {
        "command": "quantkit " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    say(f"figures are in {out}")
