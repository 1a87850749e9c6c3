"""Puts a report together: one HTML file that opens from disk and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import quantkit
from quantkit.eval.report import sections
from quantkit.eval.report.flatness import Looked, flatness_section
from quantkit.eval.report.layout import Part, Section
from quantkit.eval.report.measured import Measured
from quantkit.eval.report.record import RunRecord
from quantkit.eval.report.weights import WeightPicture

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Unfinished:
    """How far a run came, and how to go on."""

    what: str
    command: str


def run_page(
    record: RunRecord,
    *,
    measured: Measured | None = None,
    weights: Sequence[WeightPicture] = (),
    looked: Looked | None = None,
) -> str:
    """The report of a run; what is not given is left out."""
    parts: list[Section | None] = [
        sections.measured_section(measured) if measured else None,
        sections.warnings_section(record),
        *([sections.blocks_section(record), sections.layers_section(record)] if record.layers else []),
        sections.learning_section(record),
        flatness_section(looked) if looked else None,
        sections.weights_section(weights) if weights else None,
        sections.recipe_section(record),
    ]
    return _render(
        title=f"{record.model}, quantised: {' + '.join(record.methods)}, {record.scheme}",
        subtitle=f"Report of the run in {record.folder.resolve().name}",
        sections=[part for part in parts if part],
        facts=sections.facts(record),
        unfinished=None if record.end else unfinished(record),
    )


def activations_page(model: str, looked: Looked) -> str:
    """Pictures of what enters the linears of ``model``."""
    return _render(
        title=f"What enters the linears of {model}",
        subtitle=f"Activations on {looked.text}",
        sections=[flatness_section(looked)],
        facts=[],
        unfinished=None,
    )


def measured_page(model: str, measured: Measured) -> str:
    """What ``quantkit eval`` found of a ``model`` without a run record."""
    return _render(
        title=f"What {model} does",
        subtitle="Report of quantkit eval",
        sections=[sections.measured_section(measured)],
        facts=[],
        unfinished=None,
    )


def unfinished(record: RunRecord) -> Unfinished:
    """Of a run without an end."""
    done = len(record.blocks)
    of = f" of {record.block_count}" if record.block_count else ""
    output = str(record.folder).removesuffix(".partial")
    command = ["quantkit", "quantize", record.model, "--recipe", "recipe.yaml", "-o", output, "--resume"]
    return Unfinished(f"This run has not come to its end: {done}{of} blocks are done.", shlex.join(command))


def _render(**content: Any) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("quantkit.eval.report")
    template, style, script = (
        (here / name).read_text(encoding="utf-8") for name in ("template.html.jinja", "style.css", "sort.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["breakable"] = _breakable
    digest = hashlib.sha256(script.encode()).digest()
    content["sections"] = [_with_safe_pictures(section) for section in content["sections"]]
    page = environment.from_string(template).render(
        **content,
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(digest).decode()}",
        version=quantkit.__version__,
    )
    return page.encode("utf-8", "replace").decode()  # names may hold halves of characters


def _breakable(text: str) -> Markup:
    """Escaped, and a line may break behind each dot: a phone is narrower than the name of a layer."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in text.split("."))


def _with_safe_pictures(section: Section) -> Section:
    from markupsafe import Markup

    def safe(part: Part) -> Part:
        return replace(part, pictures=[replace(one, svg=Markup(one.svg)) for one in part.pictures])

    return replace(section, parts=[safe(part) for part in section.parts])
