"""The section about what enters linears: of one model, or before and after quantising."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.eval.activations import Activation
from quantkit.eval.report import figures
from quantkit.eval.report.drawing import short
from quantkit.eval.report.layout import Cell, Column, Part, Picture, Section, Table, number

EXPLAINED = (
    "Peak: largest |x| over the root mean square (rms) of all entries. Crest: of each token its largest |x| over its "
    "own rms, mean over tokens. The larger they are, the more of a rounding's grid a few outliers take up; normally "
    "distributed rows have a crest of about 3. Of a quantised linear it is the input as it is rounded, behind its "
    "scale, shift and matrix; earlier blocks are quantised then, too. Linears that read the same input are shown once."
)


@dataclass(frozen=True)
class Looked:
    """What was seen of one model, or of two."""

    after: Mapping[str, Activation]
    """By linear; of one model its inputs."""
    before: Mapping[str, Activation] | None
    """Of the model that it was made from; None: not looked at."""
    text: str
    """What the models read."""

    def sides(self, name: str) -> dict[str, Activation]:
        """``{"before": ..., "after": ...}``, or ``{"input": ...}`` where there is one side."""
        if self.before is None:
            return {"input": self.after[name]}
        before = {"before": self.before[name]} if name in self.before else {}
        return {**before, "after": self.after[name]}


def flatness_section(looked: Looked) -> Section:
    parts = [Part(paragraphs=[f"Inputs of linears on {looked.text}.", EXPLAINED], table=_table(looked))]
    parts += [Part(name, pictures=_pictures(name, looked.sides(name))) for name in looked.after]
    return Section("activations", "Activations", parts)


def _table(looked: Looked) -> Table:
    heads = ["input"] if looked.before is None else ["before", "after"]
    quantities = {
        "peak": lambda one: number(one.peak, ".1f"),
        "crest": lambda one: number(one.crest, ".2f"),
        "rounding error": lambda one: number(None if one.error is None else 100 * one.error, ".2f", " %"),
    }
    rounds = any(one.rounding for name in looked.after for one in looked.sides(name).values())
    shown = [name for name in quantities if rounds or name != "rounding error"]
    columns = [Column("linear", number=False)]
    columns += [Column(name if heads == ["input"] else f"{name}, {head}") for name in shown for head in heads]
    columns.append(Column("channels"))
    rows = []
    for name, one in looked.after.items():
        sides = looked.sides(name)
        cells = [quantities[what](sides[head]) if head in sides else Cell("") for what in shown for head in heads]
        rows.append([Cell(name), *cells, number(len(one.absmax), "d")])
    return Table(columns, rows)


def _pictures(name: str, sides: Mapping[str, Activation]) -> list[Picture]:
    relative = {side: one.absmax / (one.rms or 1.0) for side, one in sides.items()}
    samples = {side: one.sample / (one.rms or 1.0) for side, one in sides.items()}
    largest = max(float(sample.abs().max()) for sample in samples.values())
    drawn = [
        Picture(
            figures.channel_curves(f"Largest input of every channel of {short(name)}", relative),
            "Largest |x| of every channel, sorted.",
        )
    ]
    for side, sample in samples.items():
        title = f"Inputs of {short(name)} by token and channel, {side}"
        said = {"before": "Before", "after": "After, as it is rounded", "input": "Input"}[side]
        shared = -(-sample.shape[1] // figures.HEAT_COLUMNS)
        caption = f"{said}: |x| of the first {len(sample)} tokens"
        caption += f", the largest of {shared} neighbouring channels." if shared > 1 else "."
        drawn.append(Picture(figures.heat_map(title, sample, largest), caption))
    return drawn
