"""Many methods at many schemes on many models, as one resumable command and one table.

    python -m quantkit.eval.sweep eval/sweeps/weights.yaml --root FOLDER --output eval/results/weights.jsonl --jobs 2

The file says what to run; paths in it are relative to ``--root``:

    models: {bench-llama: models/bench-llama, bench-llama spread: {path: models/bench-llama, edits: [spread]}}
    texts: {novels: data/novels-test.txt}
    calibration: {source: data/novels-calibration.txt, nsamples: 64, seqlen: 256}
    seqlen: 256
    max_tokens: 16384
    tables:
      - {models: [bench-llama], methods: [rtn, sinq], schemes: [W4A16G64, W3A16G64]}

A method with options of its own has a name under ``variants``, which a table may use like any other:

    variants: {flatquant without matrices: {flatquant: {matrices: false}, rtn: {}}}

Every cell is a line of the output: quantised, saved, reloaded and measured, or the reason why not. A line that is there
is not run again. Perplexities come with the loss of every window, so that any two cells can be compared as pairs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.writer import write_atomic

AS_IT_CAME = "as it came"
"""Method of the cell that measures a model unquantised."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Strict):
    """A model, or a copy of it that computes the same and is harder to quantise."""

    path: str
    edits: tuple[str, ...] = Field((), description="names of eval/injectors.py, applied with seed 0")


class Table(_Strict):
    """Every method at every scheme on every model."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    schemes: tuple[str, ...]


class Sweep(_Strict):
    """What to run."""

    models: dict[str, Model]
    texts: dict[str, str]
    calibration: dict[str, Any] = Field(default_factory=dict, description="as in a recipe")
    seqlen: int | None = None
    max_tokens: int | None = None
    variants: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="name -> the steps of a recipe with their options, in order"
    )
    tables: tuple[Table, ...]

    @field_validator("models", mode="before")
    @classmethod
    def _a_path_will_do(cls, models: Any) -> Any:
        return {name: {"path": model} if isinstance(model, str) else model for name, model in models.items()}

    def cells(self) -> list[Cell]:
        """Each once, in the order of the tables; a model's own figure first."""
        found: dict[Cell, None] = {}
        for table in self.tables:
            for model in table.models:
                found[Cell(model, AS_IT_CAME, "")] = None
                for scheme in table.schemes:
                    found |= {Cell(model, method, scheme): None for method in table.methods}
        return list(found)


class Cell(NamedTuple):
    """One measurement."""

    model: str
    method: str
    scheme: str


def main(
    plan: Annotated[Path, typer.Argument(help="YAML file; see the top of eval/sweep.py")],
    output: Annotated[Path, typer.Option(help="JSON lines, one per cell; what is there is not run again")],
    root: Annotated[Path, typer.Option(help="folder that paths in the file are relative to")] = Path(),
    jobs: Annotated[int, typer.Option(help="cells at a time, one thread each", min=1)] = 1,
) -> None:
    """Run what is missing in OUTPUT."""
    sweep = load_sweep(plan)
    done = read_cells(output)
    missing = [cell for cell in sweep.cells() if cell not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, done.values())  # without a line that a kill cut short
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, open(output, "a", encoding="utf-8") as file:
        work = _Work(sweep, root.resolve(), Path(scratch))
        for name in dict.fromkeys(cell.model for cell in missing):
            work.make_copy(name)
        for number, line in enumerate(_lines(work, missing, jobs), start=1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            seconds = time.perf_counter() - started
            left = seconds / number * (len(missing) - number)
            print(f"{number}/{len(missing)}, about {left / 60:.0f} min left: {_describe(line)}", file=sys.stderr)
    done = read_cells(output)
    in_order = dict.fromkeys([*sweep.cells(), *done])
    _write(output, [done[cell] for cell in in_order])


def load_sweep(path: Path) -> Sweep:
    """Read and check a plan.

    Raises:
        RecipeError: it cannot be read, or a table names a model that is not there.
    """
    try:
        sweep = Sweep.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"sweep {path} cannot be read: {error}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise RecipeError(f"sweep {path}: {place}: {problem['msg']}") from None
    unknown = {name for table in sweep.tables for name in table.models} - sweep.models.keys()
    if unknown:
        raise RecipeError(f"sweep {path}: model '{min(unknown)}' of a table is not among models.")
    return sweep


def read_cells(path: Path) -> dict[Cell, dict[str, Any]]:
    """The finished cells of an output; a last line that a kill cut short is left out."""
    cells = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        cells[Cell(line["model"], line["method"], line["scheme"])] = line
    return cells


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


class _Work:
    """What a worker needs to know; small enough to be sent to one."""

    def __init__(self, sweep: Sweep, root: Path, scratch: Path) -> None:
        self.sweep = sweep
        self.root = root
        self.scratch = scratch

    def make_copy(self, name: str) -> None:
        """Write the edited copy of a model that has edits."""
        model = self.sweep.models[name]
        if model.edits:
            from quantkit.eval.injectors import EDITS, inject

            inject(self._path(model.path), self.folder(name), [EDITS[edit] for edit in model.edits])

    def folder(self, name: str) -> Path:
        """Where a model is."""
        model = self.sweep.models[name]
        return self.scratch / name.replace(" ", "-") if model.edits else self._path(model.path)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Quantise, save, reload, measure: a line of the output."""
        import torch

        from quantkit.cli.console import quiet_libraries

        quiet_libraries()
        torch.set_num_threads(1)
        line: dict[str, Any] = cell._asdict()
        try:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                out = Path(folder) / "out"
                if cell.method == AS_IT_CAME:
                    out = self.folder(cell.model)
                else:
                    line |= self._quantise(cell, out)
                line["texts"] = self._measure(out)
        except QuantkitError as error:
            line["error"] = str(error)
        return line

    def _quantise(self, cell: Cell, out: Path) -> dict[str, Any]:
        from quantkit.pipeline import quantize

        calibration = dict(self.sweep.calibration)
        if "source" in calibration and (self.root / calibration["source"]).exists():
            calibration["source"] = str(self.root / calibration["source"])
        variant = self.sweep.variants.get(cell.method)
        steps = variant and [{"method": name, "options": options} for name, options in variant.items()]
        result = quantize(
            str(self.folder(cell.model)),
            output=out,
            recipe={"steps": steps} if steps else None,
            method=None if steps else cell.method,
            scheme=cell.scheme,
            calibration=calibration,
        )
        return {
            "bits_per_weight": round(result.bits_per_weight, 4),
            "format": result.format,
            "warnings": list(result.warnings),
        }

    def _measure(self, folder: Path) -> dict[str, Any]:
        from quantkit.calibrate.text import load_text
        from quantkit.eval.perplexity import window_losses
        from quantkit.loading import load

        model, tokenizer = load(folder, dtype="float32")
        texts = {}
        for name, path in self.sweep.texts.items():
            text = load_text(str(self._path(path)) if self._path(path).exists() else path)
            losses = window_losses(
                model, tokenizer, text, seqlen=self.sweep.seqlen, max_tokens=self.sweep.max_tokens, batch_size=8
            )
            nll = [round(value, 5) for value in losses.nll.tolist()]
            texts[name] = {"perplexity": losses.perplexity().value, "nll": nll, "seqlen": losses.seqlen}
        return texts

    def _path(self, path: str) -> Path:
        return self.root / path


def _lines(work: _Work, cells: list[Cell], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(work.run, cells)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work.run, cell) for cell in cells]):
            yield done.result()


def _describe(line: Mapping[str, Any]) -> str:
    where = f"{line['model']}, {line['method']} {line['scheme']}".strip()
    if "error" in line:
        return f"{where}: {line['error']}"
    return f"{where}: " + ", ".join(f"{name} {text['perplexity']:.2f}" for name, text in line["texts"].items())


if __name__ == "__main__":
    typer.run(main)
