"""``quantkit quantize``: a model in, a smaller checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import Progress, print_json, size, table
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.pipeline import Result
    from quantkit.plan import Plan

EXAMPLES = """Examples:

quantkit quantize demo --method sinq --scheme W4A16G64 -o out

quantkit quantize meta-llama/Llama-3.1-8B --scheme W4A16G128 -o llama-w4 --dry-run

quantkit quantize ./my-model --method sinq+gptq --scheme W3A16G128 --calibration texts/ --nsamples 128 -o out

quantkit quantize ./my-model --method gptq --kv nsnquant-2bit -o out --report out/report.html

quantkit quantize ./my-model --recipe recipe.yaml -o out --resume
"""


def quantize(
    model: Annotated[str, typer.Argument(help="hub id, local folder, or 'demo'")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder for the checkpoint")] = None,
    method: Annotated[
        str | None, typer.Option(help="methods joined by '+'; see `quantkit methods`  [default: sinq]")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="for example W4A16G64, W8A8, W3ZA16G128, WNF4A16G64; behind the activation bits Z: zero point, "
            "T: per tensor, TS: per tensor and static (W6A6ZTS)  [default: W4A16G64]"
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            metavar="NAME",
            help="how the checkpoint has keys and values kept: nsnquant-2bit, kivi-2bit, int8 ... "
            "(`quantkit methods` has them all); loading it goes by that  [default: as KV<bits> of the scheme says]",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON recipe; the other flags override it")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="module to leave in full precision (name, glob or re:...); repeatable")
    ] = None,
    format: Annotated[str | None, typer.Option(help="auto, compressed-tensors or quantkit")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="text for methods that need data: demo, generated, wikitext2, c4, pile-val, ultrachat, or a "
            ".txt/.jsonl/.parquet file or folder  [default: demo]"
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="column of the calibration text that is read")] = None,
    nsamples: Annotated[int | None, typer.Option(help="calibration windows  [default: 64]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="tokens per calibration window  [default: 512]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="calibration windows per forward pass  [default: 8]")] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB that calibration's hidden states may take; more of them are kept on disk  [default: all]"
        ),
    ] = None,
    block_parallel: Annotated[
        int | None,
        typer.Option(
            help="learn so many blocks at once, each in a process with one thread; for transforms that look at the "
            "float model alone (flatquant)"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="keep layers with NaN or Inf in full precision")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in the output folder")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on after the blocks that a stopped run finished")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write the page of `quantkit report` about the run there"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the recipe and the plan, write nothing")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the model")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Quantise MODEL block by block and prove that the saved checkpoint reloads."""
    from quantkit.presets import expand

    samples = {
        "source": calibration,
        "column": column,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "seed": seed,
        "max_memory": max_memory,
    }
    expanded = expand(
        recipe, method=method, scheme=scheme, ignore=tuple(ignore) if ignore else None, format=format, dtype=dtype,
        seed=seed, kv=kv, allow_nonfinite=allow_nonfinite or None,
        calibration={key: value for key, value in samples.items() if value is not None} or None,
    )  # fmt: skip
    if kv is not None and expanded.scheme.kv is not None:  # of --kv none the recipe keeps nothing that could clash
        raise RecipeError(
            f"--kv {kv} with scheme {expanded.scheme.name}, which says how keys and values are kept, too; leave "
            f"KV{expanded.scheme.kv.bits} out of the scheme, or --kv."
        )
    if report is not None:
        _check_report(report, output, dry_run)
    if dry_run:
        from quantkit.pipeline import prepare

        plan, _, _ = prepare(model, expanded, trust_remote_code=trust_remote_code)
        if as_json:
            print_json(plan.describe())
        else:
            _print_plan(plan)
        return
    if output is None:
        raise RecipeError("no output folder given; add -o OUT (or --dry-run to see the plan only).")
    from quantkit.pipeline import quantize as run

    with Progress(quiet=as_json) as progress:
        result = run(
            model, output=output, recipe=expanded, overwrite=overwrite, resume=resume, block_parallel=block_parallel,
            trust_remote_code=trust_remote_code, on_progress=progress.update,
        )  # fmt: skip
    if as_json:
        print_json(vars(result) | {"output": str(result.output)})
    else:
        _print_result(result)
    if report is not None:
        from quantkit.cli.report import write_run
        from quantkit.eval.report.record import load_record

        write_run(report, result.output, load_record(result.output))
        if not as_json:
            print(f"the report is {report}")


def _check_report(report: Path, output: Path | None, dry_run: bool) -> None:
    """Before the run: it may take hours.

    Raises:
        RecipeError: there will be no run, or no such folder.
        QuantkitError: a library is missing that reports are made with.
    """
    from quantkit.eval.report.drawing import check_libraries

    if dry_run:
        raise RecipeError(f"--report {report} is about a run, and --dry-run makes none; leave one of them out.")
    page, folder = report.resolve(), output.resolve() if output else None
    if page.is_dir() or page == folder or not (page.parent.is_dir() or page.parent == folder):
        raise RecipeError(f"--report {report}: name a file in a folder that is there, or in OUT.")
    check_libraries()


def _print_result(result: Result) -> None:
    from quantkit.formats.summary import summarise
    from quantkit.formats.writer import RUN_RECORD, read_record

    print(
        f"{result.output}: {result.layers} linears at {result.bits_per_weight:.3f} bits per weight, "
        f"{size(result.source_bytes)} -> {size(result.output_bytes)}, {result.seconds:.1f} s, "
        f"peak memory {size(result.peak_rss_bytes)}"
    )
    for line in summarise(read_record(result.output / RUN_RECORD)):
        print(line)
    print(f"reload checked; loads in {result.loads_in}")


def _print_plan(plan: Plan) -> None:
    print(plan.recipe.to_yaml())
    rows = []
    for layer in plan.layers:
        held = "full precision" if layer.format is None else layer.format.describe()
        rows.append(
            [layer.name, f"{layer.out_features} x {layer.in_features}", held, layer.reason, size(layer.stored_bytes)]
        )
    table(["layer", "out x in", "stored as", "note", "size"], rows)
    print(f"format: {plan.format} ({plan.format_reason})")
    print(f"loads in: {plan.loads_in}")
    print(f"size: {size(plan.source_bytes)} -> {size(plan.output_bytes)}; peak memory about {size(plan.peak_bytes)}")
    for note in plan.notes:
        print(f"note: {note}")
