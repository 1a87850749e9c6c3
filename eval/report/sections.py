"""The sections about a run and its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from quantkit.eval.report import figures
from quantkit.eval.report.drawing import SERIES, short
from quantkit.eval.report.layout import (
    Cell,
    Column,
    Folded,
    Part,
    Picture,
    Section,
    Table,
    number,
    seconds,
    size,
)
from quantkit.eval.report.measured import Figure, Measured
from quantkit.eval.report.record import LayerRow, RunRecord
from quantkit.eval.report.weights import WeightPicture

MOST_ROWS = 2000
"""Of the table of layers: a mixture of experts has tens of thousands."""
CURVES = 4
"""Blocks whose training is drawn alone."""


def measured_section(measured: Measured) -> Section:
    before, after = (", ".join(measured.models[side]) for side in ("before", "after"))
    columns = [Column("quantity", number=False), *(Column(name) for name in ("before", "after", "change"))]
    columns += [Column("95 % interval"), Column("measured on", number=False)]
    table = Table(columns, [_measured_row(one) for one in measured.figures.values()])
    said = f"Before: {before or 'not measured'}. After: {after or 'not measured'}. As quantkit eval measured them."
    return Section("measured", "Before and after", [Part(paragraphs=[said], table=table), Part(points=measured.notes)])


def _measured_row(one: Figure) -> list[Cell]:
    def shown(value: float) -> str:
        return f"{100 * value:+.2f} %" if one.relative else f"{value:+.4g}"

    change = one.change
    won = change is not None and change != 0 and (change < 0) == (one.better == "lower")
    mood = "" if not change or not one.better else "better" if won else "worse"
    interval = "" if one.interval is None else " .. ".join(shown(end) for end in one.interval)
    return [
        Cell(f"{one.on}: {one.quantity}"),
        number(one.before, ".5g"),
        number(one.after, ".5g"),
        Cell("" if change is None else shown(change), mood=mood),  # type: ignore[arg-type]
        Cell(interval),
        Cell(one.how),
    ]


def warnings_section(record: RunRecord) -> Section:
    """Warnings of the run, and what its record tells that deserves one."""
    points = list(record.end.warnings) if record.end else []
    points += [f"{name}: holds NaN or Inf, kept in full precision." for block in record.blocks for name in block.kept]
    if not record.end:  # a finished run has warned of them
        fallen = [layer for layer in record.layers if layer.fallback]
        points += [f"{layer.name}: rounded to nearest: {layer.fallback}." for layer in fallen]
    for block in record.blocks:
        for change in (change for change in block.changes if change.accepted is False):
            where = f"block {block.index}" + (f", {change.place}" if change.place else "")
            points.append(f"{where}: what {change.method} learned was no better and was not kept.")
    points = list(dict.fromkeys(points))
    nothing = "None." if record.end else "None so far; a run writes its warnings down at its end."
    return Section("warnings", "Warnings", [Part(points=points) if points else Part(paragraphs=[nothing])])


def blocks_section(record: RunRecord) -> Section:
    losses = [Part("What the methods won", pictures=drawn)] if (drawn := list(_losses(record))) else []
    return Section("blocks", "Block by block", [*losses, _resources(record)])


def _losses(record: RunRecord) -> Iterator[Picture]:
    for method in dict.fromkeys(change.method for block in record.blocks for change in block.changes):
        before: dict[int, float] = {}
        after: dict[int, float] = {}
        places = 1
        for block in record.blocks:
            found = [(one.before, one.after) for one in block.changes if one.method == method]
            pairs = [(old, new) for old, new in found if old is not None and new is not None]
            if pairs:
                before[block.index], after[block.index] = (median(side) for side in zip(*pairs, strict=True))
                places = max(places, len(pairs))
        if not before:
            continue
        what = "median over the places of a block" if places > 1 else "of the block's output"
        caption = f"Loss that {method} minimises, {what}, before and after it."
        title = f"Loss per block before and after {method}"
        yield Picture(figures.block_losses(title, before, after, "loss"), caption)


def _resources(record: RunRecord) -> Part:
    spent = {block.index: block.seconds for block in record.blocks}
    peak = max(block.peak_rss_bytes for block in record.blocks)
    unit, divisor = ("GB", 1e9) if peak >= 1e9 else ("MB", 1e6)
    memory = {block.index: block.peak_rss_bytes / divisor for block in record.blocks}
    rows = [
        [
            Cell(str(block.index), block.index),
            number(100 * median(layer.error for layer in block.layers) if block.layers else None, ".2f", " %"),
            number(block.seconds, ".1f", " s"),
            Cell(size(block.peak_rss_bytes), block.peak_rss_bytes),
        ]
        for block in record.blocks
    ]
    columns = [Column(heading) for heading in ("block", "weight error (median)", "time", "peak memory so far")]
    return Part(
        "Time and memory",
        pictures=[
            Picture(figures.bars("Time per block", spent, "time (s)"), "Time per block."),
            Picture(
                figures.bars("Peak memory per block", memory, f"peak memory ({unit})"),
                "Largest memory of the process up to the end of each block.",
            ),
        ],
        folded=Folded("Numbers of every block", Table(columns, rows)),
    )


def layers_section(record: RunRecord) -> Section:
    layers = record.layers
    shown = layers[:MOST_ROWS]
    paragraphs = [
        "Weight error: Frobenius norm of the difference to the original weight over the weight's, worst first. Bits "
        "per weight are those stored, scales and everything else included. A heading sorts by its column."
    ]
    if len(shown) < len(layers):
        paragraphs.append(f"The worst {len(shown)} of {len(layers)}; quantkit inspect has all of them.")
    with_loss = any(layer.loss is not None for layer in layers)
    columns = [Column("layer", number=False), Column("weight error"), Column("bits per weight")]
    columns += [Column("output loss")] if with_loss else []
    columns += [Column("stored as", number=False), Column("out x in"), Column("size")]
    rows = [_layer_row(layer, with_loss) for layer in shown]
    parts = [Part(paragraphs=paragraphs, pictures=_errors(layers)), Part(table=Table(columns, rows, sorted_by=1))]
    return Section("layers", "Layer by layer", parts)


def _layer_row(layer: LayerRow, with_loss: bool) -> list[Cell]:
    return [
        Cell(layer.name),
        number(100 * layer.error, ".2f", " %"),
        number(layer.bits_per_weight, ".3f"),
        *([number(layer.loss)] if with_loss else []),
        Cell(layer.format.describe()),
        Cell(f"{layer.out_features} x {layer.in_features}", layer.out_features * layer.in_features),
        Cell(size(layer.bytes), layer.bytes),
    ]


def _errors(layers: Sequence[LayerRow]) -> list[Picture]:
    by_kind: dict[str, dict[int, list[float]]] = {}
    for layer in layers:  # worst first, and so are the kinds
        by_kind.setdefault(layer.kind, {}).setdefault(layer.block, []).append(layer.error)
    kinds = list(by_kind)[: len(SERIES)]
    leaves = [kind.rpartition(".")[2] for kind in kinds]
    names = {kind: kind if leaves.count(leaf) > 1 else leaf for kind, leaf in zip(kinds, leaves, strict=True)}
    errors = {names[kind]: {block: median(by_kind[kind][block]) for block in sorted(by_kind[kind])} for kind in kinds}
    caption = "Weight error of each kind of linear"
    caption += ", median over experts" if any("*" in kind for kind in kinds) else ""
    if len(kinds) < len(by_kind):
        caption += f"; the {len(kinds)} kinds with the largest of {len(by_kind)}"
    return [Picture(figures.errors_by_kind("Weight error by block and kind of linear", errors), f"{caption}.")]


def learning_section(record: RunRecord) -> Section | None:
    curves = {
        (change.method, block.index): change.learning
        for block in record.blocks
        for change in block.changes
        if change.learning
    }
    parts = []
    for method in dict.fromkeys(method for method, _ in curves):
        own = {block: curve for (name, block), curve in curves.items() if name == method}
        pictures = [
            Picture(
                figures.learning(f"Learning curves of {method}", own),
                "Loss on samples that are held out, over what it was before the first step.",
            )
        ]
        for block in _spread(list(own), CURVES):
            title = f"Learning curve of {method} in block {block}"
            pictures.append(Picture(figures.learning_of_block(title, own[block]), f"Block {block}."))
        parts.append(Part(method, pictures=pictures))
    return Section("learning", "Learning curves", parts) if parts else None


def _spread(blocks: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, the first and the last among them."""
    if len(blocks) <= count:
        return list(blocks)
    return [blocks[round(place * (len(blocks) - 1) / (count - 1))] for place in range(count)]


def weights_section(pictures: Sequence[WeightPicture]) -> Section:
    parts = [
        Part(
            paragraphs=[
                "The linears with the largest weight error. Values are decoded from the codes, in the basis that they "
                "are stored in: behind folded scales and matrices."
            ]
        )
    ]
    for one in pictures:
        name = one.layer.name
        used = int((one.codes > 0).sum())
        drawn = [
            Picture(
                figures.histogram(f"Weights of {short(name)}", one.edges, one.values),
                f"Values; weight error {one.layer.error:.2%}.",
            ),
            Picture(
                figures.code_use(f"Codes of {short(name)}", one.codes),
                f"Codes: {used} of {len(one.codes)} are used.",
            ),
        ]
        parts.append(Part(name, pictures=drawn))
    return Section("weights", "Weights", parts)


def recipe_section(record: RunRecord) -> Section:
    points = [f"Model: {record.model}.", f"Loads in {record.loads_in}; format {record.format}: {record.format_reason}"]
    points += [f"Residual stream: {text}." for text in record.residual]
    points += [f"Note: {note}" for note in record.notes]
    if record.calibration:
        known = record.calibration
        points.append(
            f"Calibrated on {known.get('source')}: {known.get('nsamples')} windows of {known.get('seqlen')} tokens, "
            f"seed {known.get('seed')}."
        )
    points.append("Made with " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".")
    return Section("recipe", "Recipe", [Part(points=points, verbatim=record.recipe)])


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """The numbers at the top: of an unfinished run those that are known."""
    layers = record.layers
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    bits = record.end.bits_per_weight if record.end else 8 * sum(one.bytes for one in layers) / max(weights, 1)
    found = [("scheme", record.scheme), ("quantised linears", str(len(layers)))]
    found += [("bits per weight", f"{bits:.3f}")] if layers else []
    if record.end:
        sizes = f"{size(record.source_bytes)} to {size(record.end.output_bytes)}"
        found += [("size", sizes), ("time", seconds(record.end.seconds))]
        found += [("peak memory", size(record.end.peak_rss_bytes))]
        found += [("difference after reload", f"{record.end.probe_difference:.2g}")]
        return found
    found.append(("size before", size(record.source_bytes)))
    found.append(("time so far", seconds(sum(block.seconds for block in record.blocks))))
    if record.blocks:
        found.append(("peak memory", size(max(block.peak_rss_bytes for block in record.blocks))))
    return found
