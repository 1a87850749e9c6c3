"""``quantkit report``: what a run did, as one HTML file to look at; and pictures of any model's activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.console import say
from quantkit.cli.loaded import DeviceOption, Dtype, DtypeOption, TrustOption
from quantkit.errors import QuantkitError, RecipeError

if TYPE_CHECKING:
    from quantkit.eval.activations import Activation
    from quantkit.eval.report.flatness import Looked
    from quantkit.eval.report.measured import Measured
    from quantkit.eval.report.record import RunRecord
    from quantkit.recipe import ActivationScheme

EXAMPLES = """Examples:

quantkit report out

quantkit eval out --baseline demo --ppl demo --json > eval.json; quantkit report out --eval eval.json

quantkit eval out --baseline demo --ppl demo --report out/report.html

quantkit report out --baseline demo --text demo --layers '*.0.*' --output pictures.html
"""

REPORT = "report.html"
HISTOGRAMS = 4
"""Linears whose weights are drawn: those with the largest error."""

LayersOption = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="linears to look at, repeatable  [default: of the first, middle and last block]"),
]
TokensOption = Annotated[int, typer.Option(min=2, help="tokens of the text that activations are taken from")]


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="output folder of `quantkit quantize`")],
    evaluated: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="what `quantkit eval --json` printed; repeatable"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="add pictures of activations on this text (demo, wikitext2, a file ...); loads the model",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="model that OUT was made from, for pictures before and after")
    ] = None,
    layers: LayersOption = None,
    tokens: TokensOption = 512,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="file to write  [default: OUT/report.html]")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Write what a run did as one HTML file: recipe, losses, errors, curves, time; also of a run that stopped."""
    from quantkit.eval.report.drawing import check_libraries

    check_libraries()
    from quantkit.eval.report.measured import load_measured
    from quantkit.eval.report.record import find_record, load_record

    found = find_record(folder)
    record = load_record(found)
    if not record.end and (text or baseline):
        raise RecipeError(f"{found} is unfinished, so there is no model to look at: leave --text and --baseline out.")
    if layers and not (text or baseline):
        raise RecipeError("--layers is about activations: add --text TEXT, or --baseline MODEL, or leave it out.")
    measured = load_measured(evaluated, record.model) if evaluated else None
    looked = None
    if text or baseline:
        looked = look(str(found), text or "demo", baseline, layers or (), tokens, dtype, device, trust_remote_code)
    # Not into the folder of an unfinished run: it would stay in there when the run goes on and is finished.
    default = found / REPORT if record.end else found.with_name(f"{found.name.removesuffix('.partial')}.{REPORT}")
    path = output or default
    write_run(path, found, record, measured, looked)
    print(path if record.end else f"{path}: the run is unfinished, {len(record.blocks)} blocks are done")


def activations(model: str, page: Path | None, layers: Sequence[str], text: str, tokens: int, device: str) -> None:
    """``quantkit inspect --activations``: a table, and with ``page`` the pictures."""
    from quantkit.cli.console import table
    from quantkit.eval.report.drawing import check_libraries

    if page is not None:
        check_libraries()
    looked = look(model, text, None, layers, tokens, Dtype.auto, device, trust_remote_code=False)
    rows = []
    for one in looked.after.values():
        error = "-" if one.error is None else f"{one.error:.2%}"
        rows.append([one.name, str(len(one.absmax)), f"{one.rms:.3g}", f"{one.peak:.1f}", f"{one.crest:.2f}", error])
    heads = ["linear", "channels", "rms", "peak", "crest", "rounding error"]
    table(heads, rows, right=heads[1:])
    print(f"inputs on {looked.text}; peak: largest |x| / rms, crest: the same token by token, mean")
    if page is not None:
        from quantkit.eval.report.page import activations_page

        write_page(page, activations_page(model, looked))
        print(page)


def look(
    model: str, text: str, baseline: str | None, layers: Sequence[str], tokens: int, dtype: Dtype, device: str,
    trust_remote_code: bool,
) -> Looked:  # fmt: skip
    """What enters the linears of ``model``, and of the ``baseline``; one of them is in memory at a time.

    Raises:
        RecipeError: no such text, device or linear.
        QuantkitError: a model that cannot be loaded, or without a tokenizer.
    """
    from quantkit.calibrate.text import load_text
    from quantkit.cli.loaded import load_model
    from quantkit.eval.activations import collect
    from quantkit.eval.report.flatness import Looked

    read = load_text(text)  # before the models: a typing error shows at once

    def run(
        name: str, names: Sequence[str] | None = None, roundings: dict[str, ActivationScheme] | None = None
    ) -> dict[str, Activation]:
        say(f"looking at activations of {name}")
        loaded, tokenizer = load_model(name, dtype, device, trust_remote_code)
        return collect(loaded, tokenizer, read, names=names, patterns=layers, roundings=roundings, tokens=tokens)

    after = run(model)
    before = None
    if baseline is not None:
        schemes = {name: one.rounding for name, one in after.items() if one.rounding is not None}
        before = run(baseline, list(after), schemes)
        if not before:
            raise RecipeError(f"--baseline {baseline} has none of the linears of {model}: it is another model.")
    seen = max(one.tokens for one in after.values())
    return Looked(after, before, f"{seen} tokens of '{read.name}'")


def write_run(
    path: Path, found: Path, record: RunRecord, measured: Measured | None = None, looked: Looked | None = None
) -> None:
    """The page of the run whose ``record`` is in the folder ``found``.

    Raises:
        QuantkitError: it cannot be written there, or the checkpoint is not the one of the record.
    """
    from quantkit.eval.report.page import run_page
    from quantkit.eval.report.weights import weight_pictures

    weights = weight_pictures(found, record.layers[:HISTOGRAMS]) if record.end else []
    write_page(path, run_page(record, measured=measured, weights=weights, looked=looked))


def write_evaluation(path: Path, model: str, content: Mapping[str, Any]) -> None:
    """The page of what was measured: with that of the run, if ``model`` is an output folder of ``quantkit quantize``.

    Args:
        content: what ``quantkit eval --json`` prints.

    Raises:
        QuantkitError: as ``write_run``.
    """
    from quantkit.eval.report.measured import gather
    from quantkit.eval.report.page import measured_page
    from quantkit.eval.report.record import load_record
    from quantkit.formats.writer import RUN_RECORD

    folder = Path(model)
    if (folder / RUN_RECORD).is_file():
        record = load_record(folder)
        write_run(path, folder, record, gather({"of this run": content}, record.model))
    else:
        write_page(path, measured_page(model, gather({"of this run": content}, "")))


def check_page(path: Path) -> None:
    """Called before hours of work.

    Raises:
        QuantkitError: what draws the pictures is not installed.
        RecipeError: a page cannot be written there.
    """
    from quantkit.eval.report.drawing import check_libraries

    check_libraries()
    if path.is_dir() or not path.parent.is_dir():
        raise RecipeError(f"--report {path} {'is a folder' if path.is_dir() else 'is in no folder'}; name a file.")


def write_page(path: Path, page: str) -> None:
    """
    Raises:
        QuantkitError: it cannot be written there.
    """
    from quantkit.formats.writer import write_atomic

    try:
        write_atomic(path, page.encode("utf-8"))
    except OSError as error:
        raise QuantkitError(f"cannot write {path}: {error.strerror or error}; name another file.") from None
