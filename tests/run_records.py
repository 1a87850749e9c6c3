"""Run records written by hand, and what a browser makes of a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import RECORD_VERSION, RUN_RECORD
from quantkit.presets import expand
from quantkit.recipe import Scheme

RECIPE = expand(method="flatquant+gptq", scheme="W4A4")
ERRORS = {"self_attn.q_proj": 0.099, "mlp.up_proj": 0.125, "mlp.down_proj": 1.5}
"""As text, or as the percentages 9.90, 12.50 and 150.00, these are in another order than as numbers."""


def start(**changes: Any) -> dict[str, Any]:
    return {
        "event": "start",
        "record_version": RECORD_VERSION,
        "fingerprint": "f",
        "model": "some/model",
        "versions": {"quantkit": "0.1", "torch": "2.13"},
        "blocks": 2,
        "recipe": RECIPE.model_dump(mode="json"),
        "scheme": "W4A4GC",
        "format": "quantkit",
        "format_reason": "inputs are multiplied.",
        "loads_in": "quantkit",
        "residual": "",
        "source_bytes": 7_000_000,
        "calibration": {"source": "demo", "nsamples": 8, "seqlen": 128, "seed": 0},
        "notes": ["a note"],
    } | changes


def block(index: int, errors: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    """A finished block; errors grow with its index."""
    scheme = Scheme.parse("W4A4")
    layer = LayerFormat(weights=scheme.weights, activations=scheme.activations).model_dump(mode="json")
    learning = {"best_epoch": 1, "steps": 2, "train": [0.5, 0.4], "holdout": [0.6, 0.3, None]}
    names = {f"model.layers.{index}.{name}": error for name, error in (errors or ERRORS).items()}
    return {
        "event": "shard",
        "key": f"block {index}",
        "number": index + 2,
        "bytes": 100,
        "block": index,
        "layers": [
            {
                "layer": name,
                "stored": name,
                "shape": [40, 64],
                "format": layer,
                "bytes": 1360,
                "error": error * (1 + index / 100),
                "loss": 0.25,
                "damping": 0.01,
                "fallback": None,
            }
            for name, error in names.items()
        ],
        "kept": [],
        "transforms": [
            {
                "method": "flatquant", "loss_before": 0.8, "loss": 0.3, "accepted": True, "learning": learning
            },
            {"method": "flatquant", "site": "mlp.input", "scale_min": 0.5},
        ],
        "tuning": {},
        "seconds": 12.5 + index,
        "peak_rss_bytes": 615_000_000,
    } | changes  # fmt: skip


def end(**changes: Any) -> dict[str, Any]:
    return {
        "event": "end",
        "probe_difference": 1e-6,
        "linears": 6,
        "output_bytes": 2_500_000,
        "bits_per_weight": 4.25,
        "seconds": 64.2,
        "peak_rss_bytes": 621_000_000,
        "warnings": ["look at block 1"],
    } | changes


def write_record(folder: Path, *events: dict[str, Any], cut: str = "") -> Path:
    """``folder`` with the record of ``events`` (default: a finished run of two blocks); ``cut``: a line cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event) for event in events or (start(), block(0), block(1), end())]
    (folder / RUN_RECORD).write_text("".join(f"{line}\n" for line in lines) + cut, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser sees: elements, texts, and the rows of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self._texts: list[str] = []
        self._inside = ""
        self._in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
            return
        self._texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self._texts).split())

    def attributes(self, *names: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements for name in names if name in attrs]

    def column(self, heading: str) -> list[str]:
        """Cells of the first column of the table that has ``heading`` there."""
        first = next(number for number, row in enumerate(self.rows) if row and row[0].strip() == heading)
        width = len(self.rows[first])
        cells = []
        for row in self.rows[first + 1 :]:
            if len(row) != width:
                break
            cells.append(row[0])
        return cells
