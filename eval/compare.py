"""Methods x schemes x caches of one model in a folder: ``quantkit compare``.

The folder holds what the sweep is (``settings.json``), a line per finished cell (``cells.jsonl``) and, from these,
``results.json``, ``table.md``, ``table.csv`` and ``pareto.svg``. A sweep that was stopped goes on with what is missing;
what failed is tried again. All cells of a folder were measured in the same way: other settings are refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.eval.cells import AS_IT_CAME, Bench, Cell, Line, Measurement, OnLine, drop_failures, run_cells

SETTINGS, CELLS, SCRATCH, CHECKPOINTS = "settings.json", "cells.jsonl", "scratch", "checkpoints"
CONTENT = "content of "
"""What the name of a setting begins with that is a digest: nobody wants to read those."""


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    model: str
    methods: tuple[str, ...]
    schemes: tuple[str, ...]
    measurement: Measurement
    caches: tuple[str, ...] = ()
    """Names of ``kv/methods.py`` or ``none``; empty: as each checkpoint says."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every recipe, such as ``calibration``."""
    trust_remote_code: bool = False

    def cells(self) -> list[Cell]:
        """In the order of the table; the model as it came, with its cache in full precision, first."""
        caches = self.caches or ("",)
        before = dict.fromkeys(["none", *caches] if self.caches else caches)
        found = [Cell(self.model, AS_IT_CAME, "", kv) for kv in before]
        return found + [
            Cell(self.model, method, scheme, kv) for scheme in self.schemes for method in self.methods for kv in caches
        ]

    def check_names(self) -> None:
        """
        Raises:
            RecipeError: a method, scheme or cache that there is not, or nothing to measure.
        """
        from quantkit.formats.kv import kv_of
        from quantkit.presets import method_steps
        from quantkit.recipe import Scheme

        if not self.measurement.texts and not self.measurement.questions:
            raise RecipeError(f"nothing to measure {self.model} on: give --ppl TEXT, --tasks NAMES or both.")
        for method in self.methods:
            method_steps(method)
        for scheme in self.schemes:
            Scheme.parse(scheme)
        for cache in self.caches:
            kv_of(cache)

    def refused(self) -> dict[Cell, str]:
        """Cells that cannot be, and why; found by planning each, before any weight is read.

        Raises:
            QuantkitError: no such model, or a broken one.
        """
        from quantkit.formats.kv import kv_of
        from quantkit.kv.attach import why_not
        from quantkit.pipeline import prepare
        from quantkit.presets import expand

        refused: dict[Cell, str] = {}
        for cell in self.cells():
            if cell.method == AS_IT_CAME or cell in refused:
                continue
            cells = [cell._replace(kv=kv) for kv in self.caches or ("",)]
            try:
                recipe = expand(method=cell.method, scheme=cell.scheme, **self.flags)
                _, skeleton, _ = prepare(self.model, recipe, trust_remote_code=self.trust_remote_code)
            except RecipeError as error:
                refused |= dict.fromkeys(cells, str(error))
                continue
            for one in cells:
                wanted = kv_of(one.kv) if one.kv else None
                if wanted is not None and (reason := why_not(skeleton.model, wanted)):
                    refused[one] = f"cache '{one.kv}': {reason}."
        return refused

    def settings(self) -> dict[str, Any]:
        """What every cell of a folder has in common, by the names of the options.

        Raises:
            QuantkitError: no such model.
        """
        from quantkit.calibrate.text import load_text
        from quantkit.formats.writer import source_fingerprint
        from quantkit.models.source import resolve

        measured = self.measurement
        source = resolve(self.model, trust_remote_code=self.trust_remote_code)
        found: dict[str, Any] = {
            "MODEL": str(source),
            f"{CONTENT}MODEL": _digest(json.dumps(source_fingerprint(source)).encode()),
            "--ppl": list(measured.texts),
            "--seqlen": measured.seqlen,
            "--max-tokens": measured.max_tokens,
            "--dtype": measured.dtype,
            "--kv-stream": measured.stream,
            **{f"--{name.replace('_', '-')}": value for name, value in self._recipe_settings().items()},
        }
        for name, text in measured.texts.items():
            found[f"{CONTENT}--ppl {name}"] = _digest(load_text(text).joined.encode())
        calibration = str(found["--calibration"])
        for path in (Path(calibration), Path(calibration.partition("=")[2] or calibration)):
            if path.exists():
                found[f"{CONTENT}--calibration"] = _digest_of_files(path)
        if asked := measured.questions:
            found |= {"--tasks": list(asked.names), "--data": None if asked.data is None else str(asked.data.resolve())}
            found |= {"--limit": asked.limit, "--num-fewshot": asked.num_fewshot}
        return found

    def _recipe_settings(self) -> dict[str, Any]:
        from quantkit.recipe import Calibration

        samples = Calibration.model_validate(self.flags.get("calibration", {}))
        return {
            "calibration": samples.source,
            "nsamples": samples.nsamples,
            "calibration_seqlen": samples.seqlen,
            "seed": [samples.seed, self.flags.get("seed", 0)],
        }


def compare(
    wanted: Comparison,
    folder: Path,
    *,
    jobs: int = 1,
    keep: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    on_start: Callable[[int], None] | None = None,
    on_line: OnLine | None = None,
) -> dict[Cell, Line]:
    """Run what is missing in ``folder``.

    Args:
        jobs: checkpoints at a time, each in a process of its own.
        keep: leave the checkpoints that are made now in ``folder/checkpoints``.
        overwrite: forget the cells of ``folder``.
        threads: of each of these processes; None: all.
        on_start: as ``on_line``, for ``run_cells``.

    Returns:
        The cells that were wanted, in order.

    Raises:
        RecipeError: a name that there is not, a folder of something else, or one whose cells have other settings.
        QuantkitError: no such model, or a broken one.
    """
    wanted.check_names()
    enter_folder(folder, wanted.settings(), overwrite=overwrite)
    refused = wanted.refused()
    drop_failures(folder / CELLS)
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # what a kill left
    scratch.mkdir()
    bench = Bench(
        models={wanted.model: wanted.model}, measurement=wanted.measurement, scratch=scratch, flags=wanted.flags,
        keep=folder / CHECKPOINTS if keep else None, threads=threads, trust_remote_code=wanted.trust_remote_code,
    )  # fmt: skip
    try:
        lines = run_cells(
            folder / CELLS, wanted.cells(), bench, jobs=jobs, refused=refused, on_start=on_start, on_line=on_line
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {cell: lines[cell] for cell in wanted.cells()}


def enter_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make ``folder`` one whose cells have ``settings``.

    Raises:
        RecipeError: it is a file, holds something else, or cells with other settings.
    """
    from quantkit.formats.writer import write_atomic

    file = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"-o {folder} is a file; name a folder.")
    if file.exists() and not overwrite:
        if differs := _differences(json.loads(file.read_text(encoding="utf-8")), settings):
            raise RecipeError(
                f"the cells in {folder} have other settings: {'; '.join(differs)}. They cannot share a table: name "
                "another folder with -o, or give --overwrite to begin again."
            )
        return
    if not file.exists() and folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"-o {folder} is not empty and holds no comparison; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CELLS).unlink(missing_ok=True)
    write_atomic(file, (json.dumps(settings, indent=2) + "\n").encode())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in dict.fromkeys([*before, *now]):
        was, now_is = before.get(name), now.get(name)
        if was == now_is:
            continue
        if name.startswith(CONTENT):
            if name in before and name in now:
                found.append(f"the {name} has changed")
        else:
            found.append(f"{name} is {_shown(now_is)} and was {_shown(was)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(one) for one in value)
    return "not given" if value is None else str(value)


def _digest_of_files(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return _digest(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
