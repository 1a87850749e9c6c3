"""What ``quantkit eval --json`` printed, as rows: before and after, on the same text or task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import RecipeError

Side = Literal["before", "after"]


@dataclass
class Figure:
    """One quantity of both models."""

    on: str
    """Text or task."""
    quantity: str
    how: str
    """What both were measured on."""
    better: Literal["lower", "higher", ""]
    before: float | None = None
    after: float | None = None
    interval: tuple[float, float] | None = None
    """95 %, of the change: a ratio where ``relative``, else a difference."""
    relative: bool = False

    @property
    def change(self) -> float | None:
        """after / before - 1 where ``relative``, else after - before."""
        if self.before is None or self.after is None or (self.relative and not self.before):
            return None
        return self.after / self.before - 1 if self.relative else self.after - self.before


@dataclass
class Measured:
    """Everything that the files say."""

    figures: dict[tuple[str, str, str], Figure] = field(default_factory=dict)
    """By text or task, quantity, and what it was measured on."""
    models: dict[Side, list[str]] = field(default_factory=lambda: {"before": [], "after": []})
    notes: list[str] = field(default_factory=list)


def load_measured(files: Sequence[Path], source: str) -> Measured:
    """Read the files; a model that is neither ``source`` nor the baseline of a file counts as quantised.

    Args:
        source: the model that the run was given.

    Raises:
        RecipeError: a file that cannot be read or is no output of ``quantkit eval --json``; two files that say
            different things about the same.
    """
    return gather({str(file): _read(file) for file in files}, source)


def gather(contents: Mapping[str, Mapping[str, Any]], source: str) -> Measured:
    """As ``load_measured``, of what is in the files.

    Args:
        contents: by name of the file.
    """
    baselines = {source} | {str(one["baseline"]) for one in contents.values() if one.get("baseline")}
    found = Measured()
    for file, content in contents.items():
        # One that stands beside a baseline may be the same model with another cache.
        side: Side = "before" if not content.get("baseline") and content["model"] in baselines else "after"
        try:
            for one in _figures(content, side):
                _merge(found, one, file)
            _tell(found, content, side)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"--eval {file} is not what `quantkit eval --json` prints ({error!r}).") from None
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--eval {file} cannot be read as JSON: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), str):
        raise RecipeError(f"--eval {file} is not what `quantkit eval --json` prints: it names no model.")
    return content


def _figures(content: Mapping[str, Any], side: Side) -> Iterator[Figure]:
    fidelity = content.get("fidelity", {})
    for text, one in content.get("perplexity", {}).items():
        beside = fidelity.get(text, {})
        yield _perplexity(text, one, side)
        if beside:
            yield from _compared(text, one, beside)
    yield from _scores(content.get("tasks", {}), side)
    yield from _scores(content.get("baseline_tasks", {}), "before")
    for change in content.get("task_changes", ()):
        low, high = _number(change["low"]), _number(change["high"])
        interval = None if low is None or high is None else (low, high)
        yield _score(change["task"], change["metric"], content["tasks"], interval=interval)
    if "kv_cache" in content:
        bits = content["kv_cache"].get("bits_per_element")
        yield _sided(Figure("keys and values", "bits per element", "", "lower"), side, bits)


def _perplexity(text: str, one: Mapping[str, Any], side: Side) -> Figure:
    how = f"{one['tokens']} tokens, windows of {one['seqlen']}"
    return _sided(Figure(text, "perplexity", how, "lower", relative=True), side, one["value"])


def _compared(text: str, one: Mapping[str, Any], beside: Mapping[str, Any]) -> Iterator[Figure]:
    theirs = _perplexity(text, beside["baseline_perplexity"], "before")
    how = theirs.how
    found = beside.get("divergence")
    if found and theirs.how == _perplexity(text, one, "after").how:
        low, high = (_number(found["perplexity_ratio"][end]) for end in ("low", "high"))
        theirs.interval = None if low is None or high is None else (low - 1, high - 1)
    yield theirs
    bits = Figure(text, "bits per byte", how, "lower", relative=True)
    bits.before, bits.after = _number(beside["baseline_bits_per_byte"]), _number(beside["bits_per_byte"])
    yield bits
    if not found:
        return
    kl = Figure(text, "KL divergence (nats per token)", how, "lower", after=_number(found["kl"]))
    top = Figure(text, "same likeliest token (%)", how, "higher", after=100 * float(found["top1_agreement"]))
    kl.before, top.before = 0.0, 100.0
    yield from (kl, top)


def _scores(tasks: Mapping[str, Any], side: Side) -> Iterator[Figure]:
    for task, numbers in tasks.get("results", {}).items():
        for key, value in numbers.items():
            metric, comma, behind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield _sided(_score(task, metric if behind == "none" else key, tasks), side, value)


def _score(task: str, metric: str, tasks: Mapping[str, Any], interval: tuple[float, float] | None = None) -> Figure:
    shots, documents = tasks.get("n-shot", {}).get(task), tasks.get("n-samples", {}).get(task, {}).get("effective")
    parts = [f"{documents} documents" if documents else "", "" if shots is None else f"{shots} shots"]
    higher = tasks.get("higher_is_better", {}).get(task, {}).get(metric.partition(",")[0])
    better: Literal["lower", "higher", ""] = "" if higher is None else "higher" if higher else "lower"
    return Figure(task, metric, ", ".join(filter(None, parts)), better, interval=interval)


def _sided(figure: Figure, side: Side, value: Any) -> Figure:
    if side == "before":
        figure.before = _number(value)
    else:
        figure.after = _number(value)
    return figure


def _merge(found: Measured, new: Figure, file: str) -> None:
    old = found.figures.setdefault((new.on, new.quantity, new.how), new)
    for name in ("before", "after", "interval"):
        ours, theirs = getattr(old, name), getattr(new, name)
        if ours is None:
            setattr(old, name, theirs)
        elif theirs is not None and ours != theirs:
            raise RecipeError(
                f"--eval {file} says {theirs} for {new.quantity} on {new.on}, another file {ours}; give one of them."
            )


def _tell(found: Measured, content: Mapping[str, Any], side: Side) -> None:
    baseline: list[str] = [str(content["baseline"])] if content.get("baseline") else []
    named: tuple[tuple[Side, list[str]], ...] = ((side, [content["model"]]), ("before", baseline))
    for where, models in named:
        found.models[where] += [model for model in models if model not in found.models[where]]
    for text, one in content.get("fidelity", {}).items():
        if one.get("why_not"):
            found.notes.append(f"{text}: no KL divergence, because {one['why_not']}.")
    for text, one in content.get("perplexity", {}).items():
        note = f"{text}: {one['protocol']}."
        if note not in found.notes:
            found.notes.append(note)
    if kept := content.get("kv_cache", {}).get("format"):
        settings = ", ".join(f"{name} {value}" for name, value in kept.items())
        found.notes.append(f"keys and values of {content['model']}: {settings}.")


def _number(value: Any) -> float | None:
    """``null`` stands for what is not finite."""
    return None if value is None else float(value)
