"""``quantkit compare``: methods x schemes x caches of one model, in one resumable command and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.console import Progress, say, table
from quantkit.cli.loaded import (
    Dtype,
    DtypeOption,
    FirstDeviceOption,
    JsonOption,
    KVStreamOption,
    TrustOption,
    one_device,
)
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.eval.cells import Line, Measurement
    from quantkit.eval.compare_table import Record

EXAMPLES = """Examples:

quantkit compare demo --methods rtn,sinq,awq+gptq --schemes W4A16G64,W3A16G64 --ppl demo -o sweep

quantkit compare ./my-model --methods flatquant,hadamard --schemes W4A4 --kv none,kivi-2bit --ppl wikitext2 -o sweep

quantkit compare ./my-model --methods sinq,gptq --schemes W4A16G128 --tasks blimp --data texts/blimp --limit 50 -o sweep
"""

PICTURE = "pareto.svg"


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="hub id, local folder, or 'demo'")],
    methods: Annotated[str, typer.Option(metavar="NAMES", help="separated by commas; each may be several joined by +")],
    schemes: Annotated[str, typer.Option(metavar="NAMES", help="separated by commas, for example W4A16G64,W4A4")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="for the results; a stopped run goes on in it")
    ],
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="ways to keep keys and values, separated by commas, for example none,kivi-2bit"
        ),
    ] = None,
    kv_stream: KVStreamOption = True,
    ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="text for perplexity, repeatable, as in `quantkit eval`: demo, a file ..."),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="tokens per window  [default: 2048, or all positions of the model]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="use only the first tokens of each text")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows per forward pass: memory, not results")] = 8,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="tasks of lm-eval, separated by commas")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="local data sets of tasks")] = None,
    limit: Annotated[float | None, typer.Option(help="documents per task, or below 1 the share of them")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in front of each question")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="text for methods that need data, as in `quantkit quantize`  [default: demo]")
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="calibration windows  [default: 64]")] = None,
    calibration_seqlen: Annotated[
        int | None, typer.Option(help="tokens per calibration window  [default: 512]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="checkpoints at a time, each in a process of its own")] = 1,
    keep: Annotated[
        bool, typer.Option("--keep", help="keep the checkpoints, in FOLDER/checkpoints; else they are removed")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="forget what FOLDER holds and begin again")] = False,
    dtype: DtypeOption = Dtype.float32,
    device: FirstDeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantise MODEL by every method at every scheme, measure each beside MODEL itself, print one table.

    The results are in FOLDER as table.md, table.csv, results.json and pareto.svg. The same command again goes on with
    what is missing, and tries again what failed. Calibration text is read (or, if generated, written) once for all
    checkpoints.
    """
    from quantkit.cli.eval_measure import check_request, task_names
    from quantkit.eval.cells import Measurement, Questions, read_tasks
    from quantkit.eval.compare import Comparison
    from quantkit.eval.compare import compare as run

    questions = None
    names = task_names(tasks or ())
    check_request(model, ppl or (), names, {"--data": data, "--limit": limit, "--num-fewshot": num_fewshot})
    if names:
        questions = Questions(tuple(names), data, limit, num_fewshot)
        if not as_json:
            say("reading the tasks and their data sets")
        read_tasks(questions)
    where = one_device(device)
    measurement = Measurement(
        _texts(ppl or ()), seqlen, max_tokens, batch_size, dtype.value, None if where == "cpu" else where, questions,
        kv_stream,
    )  # fmt: skip
    samples = {"source": calibration, "nsamples": nsamples, "seqlen": calibration_seqlen, "seed": seed}
    flags: dict[str, Any] = {"calibration": {name: value for name, value in samples.items() if value is not None}}
    wanted = Comparison(
        model, _list("--methods", methods), _list("--schemes", schemes), measurement,
        caches=() if kv is None else _list("--kv", kv), flags=flags | ({} if seed is None else {"seed": seed}),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with Progress(quiet=as_json) as progress:

        def begin(total: int) -> None:
            if total and not as_json:
                say(f"{total} of {len(wanted.cells())} cells are to be measured")
            progress.start(total, "cells")

        def show(done: int, total: int, line: Line) -> None:
            progress.update("cells", done, total, _label(line))

        cells = run(
            wanted, output, jobs=jobs, keep=keep, overwrite=overwrite, threads=_threads(jobs), on_start=begin,
            on_line=show,
        )  # fmt: skip
    from quantkit.eval import compare_table

    found = compare_table.records(cells)
    _write(output, model, found, measurement)
    if as_json:
        print((output / "results.json").read_text(encoding="utf-8"), end="")
        return
    heading, *rows = compare_table.cells_of_table(found)
    table(heading, rows, right=[name for name in heading if name not in ("method", "scheme", "keys and values")])
    for line in compare_table.notes(found):
        print(line)
    say(f"the table is in {output}")


def _texts(sources: Sequence[str]) -> dict[str, str]:
    """Name -> source.

    Raises:
        RecipeError: no such text, or two of one name.
    """
    from quantkit.cli.eval_measure import read_texts

    texts = read_texts(sources, "text")
    return {text.name: source for text, source in zip(texts, sources, strict=True)}


def _list(option: str, given: str) -> tuple[str, ...]:
    """Raises:
    RecipeError: there is nothing in it.
    """
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise RecipeError(f"{option} '{given}' names nothing; give names separated by commas.")
    return names


def _threads(jobs: int) -> int | None:
    """Of each process, so that together they have the machine; None: torch's own choice, for one process."""
    import os

    return None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


def _label(line: Mapping[str, Any]) -> str:
    name = " ".join(part for part in (line["method"], line["scheme"], line.get("kv")) if part)
    if "error" in line:
        return f"{name}: failed"
    return f"{name}: " + ", ".join(f"{text} {found['perplexity']:.2f}" for text, found in line["texts"].items())


def _write(folder: Path, model: str, found: Sequence[Record], measurement: Measurement) -> None:
    """The files of the folder."""
    import json

    from quantkit.eval import compare_table
    from quantkit.eval.compare import SETTINGS
    from quantkit.eval.environment import environment
    from quantkit.formats.writer import write_atomic

    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    about = {"model": model, "settings": settings, "environment": environment()}
    write_atomic(folder / "results.json", compare_table.as_json(about, found).encode())
    write_atomic(folder / "table.md", compare_table.as_markdown(found, model).encode())
    write_atomic(folder / "table.csv", compare_table.as_csv(found).encode())
    try:
        svg = _picture(model, found)
    except ModuleNotFoundError as error:
        say(f"no {PICTURE}: it is drawn with {error.name}, which is not installed: pip install 'quantkit[report]'.")
        return
    if svg:
        write_atomic(folder / PICTURE, svg.encode())


def _picture(model: str, found: Sequence[Record]) -> str:
    """The first figure of the cells against their bits per weight; empty: nothing was quantised.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from quantkit.eval.compare_table import quality
    from quantkit.eval.report.pareto import Point, pareto

    what, higher_is_better, values = quality(found)
    points = [
        Point(", ".join(part for part in (one["method"], one["kv"]) if part), one["bits_per_weight"], value)
        for one, value in zip(found, values, strict=True)
        if one["bits_per_weight"] is not None and value is not None
    ]
    return pareto(model, points, values[0], what, higher_is_better=higher_is_better) if points else ""
