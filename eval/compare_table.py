"""What ``quantkit compare`` found, as one table in Markdown, CSV and JSON: the same numbers in each.

A ratio is the perplexity over that of the first cell, the model as it came, on the same windows, with the 95 % interval
of a paired bootstrap (``quantkit.eval.paired``).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.eval.cells import AS_IT_CAME, Cell, Line
from quantkit.eval.tables import markdown

Record = dict[str, Any]
"""A cell as it stands in results.json: plain numbers, None for one that is not finite."""

KV_FACTS = ("bits_of_codes", "read_from_codes", "stream")
"""Of a cell with texts whose keys and values are quantised: ``quantkit.eval.kv_memory.cache_facts``."""

DIGITS = 4
"""Behind the point."""


def records(cells: Mapping[Cell, Line]) -> list[Record]:
    """In the order of ``cells``, of which the first is the baseline."""
    first = next(iter(cells.values()))
    return [_record(cell, line, first) for cell, line in cells.items()]


def _record(cell: Cell, line: Line, first: Line) -> Record:
    found: Record = {"method": cell.method, "scheme": cell.scheme, "kv": cell.kv or None}
    found |= {name: line.get(name) for name in ("bits_per_weight", "bytes", "format", "seconds")}
    found |= {name: line.get(name) for name in KV_FACTS}
    found["texts"] = {
        name: _text(text, first.get("texts", {}).get(name), cell) for name, text in line.get("texts", {}).items()
    }
    found |= {group: _scores(line.get(group, {})) for group in ("tasks", "subtasks")}
    found |= {"warnings": line.get("warnings", []), "error": line.get("error")}
    return found


def _text(text: Mapping[str, Any], before: Mapping[str, Any] | None, cell: Cell) -> Record:
    import torch

    from quantkit.eval.paired import perplexity_ratio

    found: Record = {"perplexity": _number(text["perplexity"]), "windows": len(text["nll"]), "seqlen": text["seqlen"]}
    if before is None or text is before:
        return found | dict.fromkeys(("ratio", "low", "high"))
    ratio = perplexity_ratio(torch.tensor(text["nll"]), torch.tensor(before["nll"]))
    return found | {"ratio": _number(ratio.value), "low": _number(ratio.low), "high": _number(ratio.high)}


def _scores(tasks: Mapping[str, Any]) -> Record:
    return {
        task: {
            metric: score | {part: _number(score[part]) for part in ("value", "stderr")}
            for metric, score in scores.items()
        }
        for task, scores in tasks.items()
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, DIGITS)


def as_json(about: Mapping[str, Any], found: Sequence[Record]) -> str:
    return json.dumps({**about, "cells": list(found)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(found: Sequence[Record]) -> str:
    """One number per column."""
    rows = [_flat(one, _texts(found), _metrics(found), any(one["kv"] for one in found)) for one in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(one: Record, texts: Sequence[str], metrics: Sequence[tuple[str, str]], with_kv: bool) -> dict[str, Any]:
    row = {"method": one["method"], "scheme": one["scheme"]} | ({"kv": one["kv"]} if with_kv else {})
    row |= {name: one[name] for name in ("bits_per_weight", "bytes", "format")}
    row |= {name: one[name] for name in KV_FACTS[:2]} if with_kv else {}
    for name in texts:
        text = one["texts"].get(name, {})
        row[f"perplexity {name}"] = text.get("perplexity")
        row |= {f"{part} {name}": text.get(part) for part in ("ratio", "low", "high")}
    for task, metric in metrics:
        score = one["tasks"].get(task, {}).get(metric, {})
        row |= {f"{task} {metric}": score.get("value"), f"{task} {metric} stderr": score.get("stderr")}
    return row | {"error": one["error"]}


def cells_of_table(found: Sequence[Record]) -> list[list[str]]:
    """The table as text, its heading first."""
    texts, metrics, with_kv = _texts(found), _metrics(found), any(one["kv"] for one in found)
    heading = ["method", "scheme", *(["keys and values"] if with_kv else []), "bits per weight", "size"]
    for name in texts:
        heading += [f"perplexity, {name}", "ratio", "95 % interval"]
    heading += [f"{task}, {metric}" for task, metric in metrics]
    return [heading, *(_row(one, texts, metrics, with_kv) for one in found)]


def _row(one: Record, texts: Sequence[str], metrics: Sequence[tuple[str, str]], with_kv: bool) -> list[str]:
    bits, size = one["bits_per_weight"], one["bytes"]
    row = [one["method"], one["scheme"], *([one["kv"] or ""] if with_kv else [])]
    row += ["" if bits is None else f"{bits:.2f}", "" if size is None else f"{size / 1e6:.2f} MB"]
    for name in texts:
        text = one["texts"].get(name)
        if text is None:
            row += ["failed", "", ""]
            continue
        interval = "" if text["low"] is None else f"{_shown(text['low'])} .. {_shown(text['high'])}"
        row += [_shown(text["perplexity"]), "" if text["ratio"] is None else _shown(text["ratio"]), interval]
    for task, metric in metrics:
        score = one["tasks"].get(task, {}).get(metric)
        row.append("failed" if score is None else _shown(score["value"], score["stderr"]))
    return row


def _shown(value: float | None, stderr: float | None = None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.{DIGITS}f}" + ("" if stderr is None else f" ± {stderr:.{DIGITS}f}")


def notes(found: Sequence[Record]) -> list[str]:
    """Sentences below the table: how it was measured, and why cells failed."""
    lines = []
    measured = next((one for one in found if one["texts"]), None)
    for name, text in (measured["texts"] if measured else {}).items():
        lines.append(f"Perplexity on {name}: {text['windows']} windows of {text['seqlen']} tokens.")
    if measured and found[0] is measured and len(found) > 1:
        lines.append(f"Ratios are to the model {AS_IT_CAME}, of the same windows; intervals by paired bootstrap.")
    if any(one["kv"] and one["stream"] for one in found):
        lines.append("Quantised keys and values are read as they are held when each token comes.")
    if any(one["kv"] and one["stream"] is False for one in found):
        lines.append("Quantised keys and values are read as they are held at the end of a window, in one pass.")
    for one in found:
        if one["error"]:
            name = " ".join(part for part in (one["method"], one["scheme"], one["kv"]) if part)
            lines.append(f"{name} failed: {one['error']}")
    return lines


def quality(found: Sequence[Record]) -> tuple[str, bool, list[float | None]]:
    """The figure that stands for a cell: its name, whether higher is better, and its value in every cell.

    The perplexity on the first text, else the first metric of the tasks.
    """
    for name in _texts(found):
        return f"perplexity, {name}", False, [one["texts"].get(name, {}).get("perplexity") for one in found]
    for task, metric in _metrics(found):
        scores = [one["tasks"].get(task, {}).get(metric, {}) for one in found]
        higher = next((score["higher_is_better"] for score in scores if score), True) is not False
        return f"{task}, {metric}", higher, [score.get("value") for score in scores]
    return "", False, [None] * len(found)


def as_markdown(found: Sequence[Record], model: str) -> str:
    below = "".join(f"\n{line}\n" for line in notes(found))
    return f"# {model}\n\n{markdown(cells_of_table(found))}\n{below}"


def _texts(found: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one["texts"]))


def _metrics(found: Sequence[Record]) -> list[tuple[str, str]]:
    pairs = ((task, metric) for one in found for task, scores in one["tasks"].items() for metric in scores)
    return list(dict.fromkeys(pairs))
