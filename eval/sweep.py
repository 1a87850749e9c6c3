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

A table may name caches (``quantkit methods``), for the model as it came and for all that the table makes of it, which
may be nothing. Texts are read as a model that writes them reads its cache (``streaming.py``). A cache with settings of
its own, or one that is read in one pass, has a name under ``caches``:

    caches: {nsnquant-2bit one pass: {method: nsnquant-2bit, settings: {sink: 0, min_recent: 0}, stream: false}}

A method with options of its own has a name under ``variants``, which a table may use like any other:

    variants: {flatquant without matrices: {flatquant: {matrices: false}, rtn: {}}}

Every cell is a line of the output: quantised, saved, reloaded and measured, or the reason why not. A line that is there
is not run again. Perplexities come with the loss of every window, so that any two cells can be compared as pairs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantkit.errors import RecipeError
from quantkit.eval.cells import AS_IT_CAME, Bench, Cell, Kept, Line, Measurement, missing_cells, run_cells


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Strict):
    """A model, or a copy of it that computes the same and is harder to quantise."""

    path: str
    edits: tuple[str, ...] = Field((), description="names of eval/injectors.py, applied with seed 0")


class Table(_Strict):
    """Every method at every scheme on every model."""

    models: tuple[str, ...]
    methods: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    caches: tuple[str, ...] = Field((), description="empty: as the scheme says")

    def cells(self) -> list[Cell]:
        """Each model's own figure first."""
        found = []
        for model in self.models:
            kept = [(AS_IT_CAME, ""), *((method, scheme) for scheme in self.schemes for method in self.methods)]
            found += [Cell(model, AS_IT_CAME, "")]
            found += [Cell(model, *made, kv) for made in kept for kv in self.caches or ("",)]
        return found


class Cache(_Strict):
    """A way to keep keys and values, and to read them."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    stream: bool = Field(True, description="as text is generated; false: a window in one pass")


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
    caches: dict[str, Cache] = Field(default_factory=dict, description="name -> what it stands for")
    batch_size: int = Field(8, ge=1, description="windows at a time: changes speed and memory, not the numbers")
    tables: tuple[Table, ...]

    @field_validator("models", mode="before")
    @classmethod
    def _a_path_will_do(cls, models: Any) -> Any:
        return {name: {"path": model} if isinstance(model, str) else model for name, model in models.items()}

    def cells(self) -> list[Cell]:
        """Each once, in the order of the tables."""
        return list(dict.fromkeys(cell for table in self.tables for cell in table.cells()))


def main(
    plan: Annotated[Path, typer.Argument(help="YAML file; see the top of eval/sweep.py")],
    output: Annotated[Path, typer.Option(help="JSON lines, one per cell; what is there is not run again")],
    root: Annotated[Path, typer.Option(help="folder that paths in the file are relative to")] = Path(),
    jobs: Annotated[int, typer.Option(help="cells at a time, one thread each", min=1)] = 1,
) -> None:
    """Run what is missing in OUTPUT."""
    sweep = load_sweep(plan)
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def say(number: int, total: int, line: Line) -> None:
        left = (time.perf_counter() - started) / number * (total - number)
        print(f"{number}/{total}, about {left / 60:.0f} min left: {_describe(line)}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as scratch:
        folders = _Folders(sweep, root.resolve(), Path(scratch))
        for name in dict.fromkeys(cell.model for cell in missing_cells(output, sweep.cells())):
            folders.make_copy(name)
        run_cells(output, sweep.cells(), folders.bench(), jobs=jobs, on_line=say)


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


class _Folders:
    """Where things are: paths of a plan are relative to a root, edited copies are in a scratch folder."""

    def __init__(self, sweep: Sweep, root: Path, scratch: Path) -> None:
        self.sweep = sweep
        self.root = root
        self.scratch = scratch

    def make_copy(self, name: str) -> None:
        """Write the edited copy of a model that has edits."""
        model = self.sweep.models[name]
        if model.edits:
            from quantkit.eval.injectors import EDITS, inject

            inject(self.root / model.path, self._folder(name), [EDITS[edit] for edit in model.edits])

    def bench(self) -> Bench:
        """The sweep, as its cells are run."""
        sweep = self.sweep
        calibration = dict(sweep.calibration)
        if "source" in calibration:
            calibration["source"] = self._text(calibration["source"])
        return Bench(
            models={name: str(self._folder(name)) for name in sweep.models},
            measurement=Measurement(
                texts={name: self._text(text) for name, text in sweep.texts.items()},
                seqlen=sweep.seqlen,
                max_tokens=sweep.max_tokens,
                batch_size=sweep.batch_size,
            ),
            scratch=self.scratch,
            flags={"calibration": calibration},
            variants=sweep.variants,
            caches={kv: self._kept(kv) for kv in {cell.kv for cell in sweep.cells()} if kv},
            threads=1,
        )

    def _kept(self, kv: str) -> Kept:
        known = self.sweep.caches.get(kv, Cache(method=kv))
        return Kept(known.method, known.settings, known.stream)

    def _folder(self, name: str) -> Path:
        model = self.sweep.models[name]
        return self.scratch / name.replace(" ", "-") if model.edits else self.root / model.path

    def _text(self, name: str) -> str:
        """The file of that name, else the name of a data set."""
        path = self.root / name
        return str(path) if path.exists() else name


def _describe(line: Mapping[str, Any]) -> str:
    where = f"{line['model']}, {line['method']} {line['scheme']}".strip() + f" {line.get('kv', '')}".rstrip()
    if "error" in line:
        return f"{where}: {line['error']}"
    return f"{where}: " + ", ".join(f"{name} {text['perplexity']:.2f}" for name, text in line["texts"].items())


if __name__ == "__main__":
    typer.run(main)
