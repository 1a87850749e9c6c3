"""Cells: a model quantised by a method at a scheme, saved, reloaded and measured; each is one line of JSON.

What every sweep stands on: ``quantkit.eval.sweep`` (several models, a YAML plan) and ``quantkit.eval.compare`` (one
model, the command line). A line that is there is not run again, so a sweep that was stopped goes on with what is
missing. Cells that differ in their cache alone are one job: quantised once, measured under each of the caches.
Perplexities come with the loss of every window, so that any two cells can be compared as pairs.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantkit.errors import QuantkitError
from quantkit.formats.writer import write_atomic

if TYPE_CHECKING:
    from quantkit.eval.tasks import Tasks

logger = logging.getLogger("quantkit")

AS_IT_CAME = "as it came"
"""Method of the cell that measures a model unquantised."""

Line = dict[str, Any]
"""A finished cell: its names, then what was found out or ``error``."""

OnLine = Callable[[int, int, Line], None]
"""Called with (cells done, cells in all, the line of the last one)."""


class Cell(NamedTuple):
    """One measurement."""

    model: str
    method: str
    scheme: str
    kv: str = ""
    """How keys and values are kept, a name of ``kv/methods.py`` or ``none``; empty: as the checkpoint says."""

    def line(self) -> Line:
        """What a line of this cell begins with."""
        return {name: value for name, value in self._asdict().items() if value or name != "kv"}

    def __str__(self) -> str:
        kept = f", {self.kv}" if self.kv else ""
        return f"{self.model}, {self.method} {self.scheme}".strip() + kept


class Job(NamedTuple):
    """Cells that share one checkpoint."""

    model: str
    method: str
    scheme: str
    caches: tuple[str, ...]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(self.model, self.method, self.scheme, kv) for kv in self.caches]


@dataclass(frozen=True)
class Questions:
    """Tasks of lm-eval: what ``load_tasks`` and ``zero_shot`` are told."""

    names: tuple[str, ...]
    data: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None


@functools.cache
def read_tasks(questions: Questions) -> Tasks:
    """Once per process.

    Raises:
        RecipeError: as ``load_tasks``.
        QuantkitError: as ``load_tasks``.
    """
    from quantkit.eval.tasks import load_tasks

    return load_tasks(questions.names, data=questions.data)


@dataclass(frozen=True)
class Kept:
    """What the ``kv`` of a cell stands for, where its name alone does not say it."""

    method: str
    """Of ``kv/methods.py``, or a name with settings in it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = True
    """As for ``window_losses``."""


@dataclass(frozen=True)
class Measurement:
    """What a model is measured on."""

    texts: Mapping[str, str]
    """Name in the results -> what ``load_text`` reads."""
    seqlen: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    dtype: str = "float32"
    """Arithmetic: in bfloat16 the noise, about 0.02 %, would hide small differences."""
    device_map: str | None = None
    questions: Questions | None = None
    stream: bool = True
    """As for ``window_losses``, of caches that do not say it themselves."""

    def figures(self, model: Any, tokenizer: Any, name: str, stream: bool | None = None) -> Line:
        """Every figure of ``model`` as it is now.

        Args:
            stream: in the place of the measurement's own.

        Raises:
            RecipeError: as ``window_losses`` and ``zero_shot``.
            QuantkitError: as these.
        """
        from quantkit.calibrate.text import load_text
        from quantkit.eval.perplexity import window_losses

        stream = self.stream if stream is None else stream
        texts = {}
        for text, source in self.texts.items():
            losses = window_losses(
                model, tokenizer, load_text(source), seqlen=self.seqlen, max_tokens=self.max_tokens,
                batch_size=self.batch_size, stream=stream,
            )  # fmt: skip
            nll = [round(value, 5) for value in losses.nll.tolist()]
            texts[text] = {"perplexity": losses.perplexity().value, "nll": nll, "seqlen": losses.seqlen}
        figures: Line = {"texts": texts}
        return figures | (self._scores(model, tokenizer, name, self.questions, stream) if self.questions else {})

    def _scores(self, model: Any, tokenizer: Any, name: str, questions: Questions, stream: bool) -> Line:
        """``tasks``: what was asked for; ``subtasks``: the members of the groups among it."""
        from quantkit.eval.zero_shot import zero_shot

        found = zero_shot(
            model, tokenizer, read_tasks(questions), name=name, limit=questions.limit,
            num_fewshot=questions.num_fewshot, stream=stream,
        )  # fmt: skip
        members = {task for tasks in found.results.get("group_subtasks", {}).values() for task in tasks}
        scores: Line = {"tasks": {}, "subtasks": {}}
        for one in found.scores():
            place = scores["subtasks" if one.task in members else "tasks"]
            score = {"value": one.value, "stderr": one.stderr, "higher_is_better": one.higher_is_better}
            place.setdefault(one.task, {})[one.metric] = score
        return scores


@dataclass(frozen=True)
class Bench:
    """What is done to make a cell; small enough to be sent to a worker."""

    models: Mapping[str, str]
    """Name of a cell's model -> what ``quantize`` and ``load`` take."""
    measurement: Measurement
    scratch: Path
    """Folder for checkpoints while they are measured, and for the calibration samples that they share."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every recipe, for ``quantize``."""
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Method of a cell -> the steps that it stands for, with their options, in order."""
    caches: Mapping[str, Kept] = field(default_factory=dict)
    """The ``kv`` of a cell -> what it stands for; of others the name says it."""
    keep: Path | None = None
    """Folder where checkpoints stay; None: they are removed when they have been measured."""
    threads: int | None = None
    """Of torch in this process; None: as it is."""
    trust_remote_code: bool = False

    def run(self, job: Job) -> Iterator[Line]:
        """Quantise, save, reload, measure: a line per cell, as soon as it is there."""
        import torch

        from quantkit.cli.console import quiet_libraries

        quiet_libraries()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        facts: Line = {}
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            try:
                out, facts = self._checkpoint(job, Path(folder))
                model, tokenizer = self._load(out)
            except Exception as error:
                yield from [cell.line() | facts | _failure(cell, error) for cell in job.cells]
                return
            for cell in job.cells:
                try:
                    line = self._figures(cell, model, tokenizer)
                except Exception as error:
                    line = _failure(cell, error)
                yield cell.line() | facts | line

    def _checkpoint(self, job: Job, scratch: Path) -> tuple[str, Line]:
        """What to load for the cells of ``job``, and what is known of it."""
        if job.method == AS_IT_CAME:
            return self.models[job.model], {}
        from quantkit.pipeline import quantize

        out = (self.keep or scratch) / f"{job.method}-{job.scheme}"
        variant = self.variants.get(job.method)
        steps = variant and [{"method": name, "options": dict(options)} for name, options in variant.items()]
        result = quantize(
            self.models[job.model], output=out, recipe={"steps": steps} if steps else None,
            method=None if steps else job.method, scheme=job.scheme, overwrite=self.keep is not None,
            shared=self.scratch, trust_remote_code=self.trust_remote_code, **self.flags,
        )  # fmt: skip
        return str(out), {
            "bits_per_weight": round(result.bits_per_weight, 4),
            "format": result.format,
            "bytes": result.output_bytes,
            "seconds": round(result.seconds, 1),
            "warnings": list(result.warnings),
        }

    def _load(self, folder: str) -> tuple[Any, Any]:
        from quantkit.loading import load

        wanted = self.measurement
        model, tokenizer = load(
            folder, dtype=wanted.dtype, device_map=wanted.device_map, trust_remote_code=self.trust_remote_code
        )
        if tokenizer is None:
            raise QuantkitError(
                f"{folder} has no tokenizer files; copy tokenizer.json and tokenizer_config.json there."
            )
        return model, tokenizer

    def _figures(self, cell: Cell, model: Any, tokenizer: Any) -> Line:
        from quantkit.eval.kv_memory import cache_facts
        from quantkit.formats.kv import kv_of
        from quantkit.kv.attach import set_kv

        if not cell.kv:
            return self.measurement.figures(model, tokenizer, str(cell))
        kept = self.caches.get(cell.kv, Kept(cell.kv, stream=self.measurement.stream))
        set_kv(model, kv_of(kept.method, kept.settings))
        found = self.measurement.figures(model, tokenizer, str(cell), kept.stream)
        windows = [text["seqlen"] for text in found["texts"].values()]
        return found | (cache_facts(model, windows[0], kept.stream) if windows else {})


def _failure(cell: Cell, error: Exception) -> Line:
    """One cell less is no reason to lose the others; what is not a request's fault keeps its traceback, on stderr."""
    if isinstance(error, QuantkitError):
        return {"error": str(error)}
    logger.error("%s failed:", cell, exc_info=error)
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def read_cells(path: Path) -> dict[Cell, Line]:
    """The finished cells of an output; a last line that a kill cut short is left out."""
    cells = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        cells[Cell(line["model"], line["method"], line["scheme"], line.get("kv", ""))] = line
    return cells


def missing_cells(path: Path, wanted: Sequence[Cell]) -> list[Cell]:
    """Those that have no line yet."""
    done = read_cells(path)
    return [cell for cell in wanted if cell not in done]


def drop_failures(path: Path) -> None:
    """Make what failed missing again."""
    _write(path, [line for line in read_cells(path).values() if "error" not in line])


def run_cells(
    path: Path,
    wanted: Sequence[Cell],
    bench: Bench,
    *,
    jobs: int = 1,
    refused: Mapping[Cell, str] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_line: OnLine | None = None,
) -> dict[Cell, Line]:
    """Run what is missing in ``path``, writing each line as soon as its cell is finished.

    Args:
        jobs: cells at a time, each in a process of its own.
        refused: cells that are known to fail, and why: these are not run.
        on_start: called with the number of cells that will be run.

    Returns:
        Every cell of the file, those that were wanted first, as they are in it now.
    """
    done = read_cells(path)
    done |= {cell: cell.line() | {"error": why} for cell, why in (refused or {}).items()}
    _write(path, done.values())  # without a line that a kill cut short
    missing = [cell for cell in wanted if cell not in done]
    if on_start:
        on_start(len(missing))
    with open(path, "a", encoding="utf-8") as file:
        for number, line in enumerate(_lines(bench, _grouped(missing), jobs), start=1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if on_line:
                on_line(number, len(missing), line)
    done = read_cells(path)
    in_order = {cell: done[cell] for cell in dict.fromkeys([*wanted, *done])}
    _write(path, in_order.values())
    return in_order


def _grouped(cells: Iterable[Cell]) -> list[Job]:
    caches: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        caches.setdefault((cell.model, cell.method, cell.scheme), []).append(cell.kv)
    return [Job(*names, tuple(kept)) for names, kept in caches.items()]


def _lines(bench: Bench, work: Sequence[Job], jobs: int) -> Iterator[Line]:
    if jobs == 1:
        for job in work:
            yield from bench.run(job)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_run, bench, job) for job in work]):
                yield from done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run(bench: Bench, job: Job) -> list[Line]:
    return list(bench.run(job))


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
