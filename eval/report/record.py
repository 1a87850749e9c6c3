"""A run record as a report needs it: typed, complete or cut off in the middle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from quantkit.errors import QuantkitError
from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import RECORD_VERSION, RUN_RECORD, read_record

T = TypeVar("T")


@dataclass(frozen=True)
class LayerRow:
    """One quantised linear as the run left it."""

    name: str
    stored: str
    """Its name in the checkpoint's files."""
    block: int
    out_features: int
    in_features: int
    format: LayerFormat
    bytes: int
    error: float
    """Frobenius norm of the weight's error over the weight's."""
    loss: float | None
    """Error of the output on calibration data, from roundings that look at them."""
    fallback: str
    """Why it was rounded to nearest although another rounding was asked for; empty: it was not."""

    @property
    def kind(self) -> str:
        """``mlp.experts.*.down_proj``: the same in every block."""
        inside = re.split(r"(?:^|\.)\d+\.", self.name, maxsplit=1)[-1]
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.out_features * self.in_features)


@dataclass(frozen=True)
class Learning:
    """The curve of one training; None where a loss was not finite."""

    train: tuple[float | None, ...]
    """Mean loss of every epoch's steps."""
    holdout: tuple[float | None, ...]
    """Before the first step, then behind every epoch."""
    best_epoch: int


@dataclass(frozen=True)
class Change:
    """What one method won at one place of a block."""

    method: str
    place: str
    """Site or linear; empty: the block as a whole."""
    before: float | None
    after: float | None
    accepted: bool | None
    """Was what was learned kept? None: nothing was learned."""
    learning: Learning | None


@dataclass(frozen=True)
class BlockRow:
    """One finished block."""

    index: int
    layers: tuple[LayerRow, ...]
    kept: tuple[str, ...]
    """Linears that stay in full precision because they are not finite."""
    changes: tuple[Change, ...]
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class End:
    """What is known of a finished run only."""

    probe_difference: float
    bits_per_weight: float
    output_bytes: int
    seconds: float
    peak_rss_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """A whole run."""

    folder: Path
    model: str
    methods: tuple[str, ...]
    scheme: str
    recipe: str
    """YAML."""
    versions: Mapping[str, str]
    format: str
    format_reason: str
    loads_in: str
    residual: tuple[str, ...]
    """What was done to the residual stream of the whole model."""
    source_bytes: int
    calibration: Mapping[str, Any]
    """Empty: the run looked at no data."""
    notes: tuple[str, ...]
    block_count: int | None
    """Of the model; None: the record does not say."""
    blocks: tuple[BlockRow, ...]
    """In model order; of a run that stopped, those that it finished."""
    end: End | None
    """None: the run did not come to its end."""

    @property
    def layers(self) -> list[LayerRow]:
        """Worst weight error first; of equal ones in model order."""
        layers = (layer for block in self.blocks for layer in block.layers)
        return sorted(layers, key=lambda layer: -math.inf if math.isnan(layer.error) else -layer.error)


def find_record(output: Path) -> Path:
    """The folder of the run that writes ``output``: itself, or the unfinished one beside it.

    Raises:
        QuantkitError: neither holds a run record.
    """
    unfinished = output.with_name(f"{output.name}.partial")
    for folder in (output, unfinished):
        if (folder / RUN_RECORD).is_file():
            return folder
    what = "has no" if output.is_dir() else "is no folder with a"
    raise QuantkitError(
        f"{output} {what} run record ({RUN_RECORD}), nor is there an unfinished run in {unfinished.name}: name the "
        "output folder of `quantkit quantize`; for other models there is `quantkit inspect MODEL --activations`."
    )


def load_record(folder: Path) -> RunRecord:
    """Read the record in ``folder``; a last line that a kill cut short is left out.

    Raises:
        QuantkitError: no record there, one of a newer quantkit, or a damaged one.
    """
    path = folder / RUN_RECORD
    try:
        events = read_record(path)
    except (OSError, UnicodeDecodeError) as error:
        raise QuantkitError(f"{path} cannot be read: {error}.") from None
    if not events or not isinstance(events[0], dict) or events[0].get("event") != "start":
        raise QuantkitError(f"{path} does not begin as a run record does; quantise again to have one.")
    version = events[0].get("record_version", 1)
    if not isinstance(version, int) or version > RECORD_VERSION:
        raise QuantkitError(
            f"{path} is a record of version {version}; this quantkit reads up to {RECORD_VERSION}: upgrade quantkit."
        )
    start: dict[str, Any] = events[0]
    blocks: dict[int, BlockRow] = {}
    residual, end = [start.get("residual")], None
    for number, event in enumerate(events[1:], start=2):
        line = _parsed(path, number, event, _line)
        if isinstance(line, BlockRow):
            blocks[line.index] = line  # of a block that was done again after its shard got lost, the later
        elif isinstance(line, End):
            end = line
        else:
            residual.append(line)

    def whole(start: Mapping[str, Any]) -> RunRecord:
        return RunRecord(
            folder=folder,
            model=str(start["model"]),
            methods=tuple(str(step["method"]) for step in start["recipe"]["steps"]),
            scheme=str(start["scheme"]),
            recipe=yaml.safe_dump(start["recipe"], sort_keys=False),
            versions={str(name): str(version) for name, version in start.get("versions", {}).items()},
            format=str(start["format"]),
            format_reason=str(start["format_reason"]),
            loads_in=str(start["loads_in"]),
            residual=tuple(str(text) for text in residual if text),
            source_bytes=int(start["source_bytes"]),
            calibration=dict(start.get("calibration") or {}),
            notes=tuple(map(str, start.get("notes", ()))),
            block_count=start.get("blocks"),
            blocks=tuple(blocks[index] for index in sorted(blocks)),
            end=end,
        )

    return _parsed(path, 1, start, whole)


def _parsed(path: Path, number: int, event: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        return parse(event)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        what = f"has no {reason}" if isinstance(error, KeyError) else f"is not as expected ({reason[:200]})"
        raise QuantkitError(f"{path}: line {number} {what}; the record is damaged, quantise again.") from None


def _line(event: Mapping[str, Any]) -> BlockRow | End | str | None:
    """A block, the end, or what was done to the residual stream; None: nothing that a report shows."""
    if "block" in event:
        return _block(event)
    return _end(event) if event.get("event") == "end" else event.get("residual")


def _block(event: Mapping[str, Any]) -> BlockRow:
    index = int(event["block"])
    facts = [*event.get("transforms", ()), *([event["tuning"]] if event.get("tuning") else ())]
    return BlockRow(
        index=index,
        layers=tuple(_layer(index, row) for row in event["layers"]),
        kept=tuple(map(str, event.get("kept", ()))),
        changes=tuple(_change(fact) for fact in facts if "loss" in fact or "learning" in fact),
        seconds=float(event["seconds"]),
        peak_rss_bytes=int(event["peak_rss_bytes"]),
    )


def _layer(block: int, row: Mapping[str, Any]) -> LayerRow:
    out_features, in_features = map(int, row["shape"])
    if out_features < 1 or in_features < 1:
        raise ValueError(f"a weight of {out_features} x {in_features}")
    return LayerRow(
        name=str(row["layer"]),
        stored=str(row.get("stored", row["layer"])),
        block=block,
        out_features=out_features,
        in_features=in_features,
        format=LayerFormat.model_validate(row["format"]),
        bytes=int(row["bytes"]),
        error=float(row["error"]),
        loss=_number(row.get("loss")),
        fallback=str(row.get("fallback") or ""),
    )


def _change(fact: Mapping[str, Any]) -> Change:
    learning = fact.get("learning")
    return Change(
        method=str(fact["method"]),
        place=str(fact.get("site") or fact.get("linear") or ""),
        before=_number(fact.get("loss_before")),
        after=_number(fact.get("loss")),
        accepted=fact.get("accepted"),
        learning=None if not learning else _learning(learning),
    )


def _learning(curve: Mapping[str, Any]) -> Learning:
    train, holdout = (tuple(_number(loss) for loss in curve[name]) for name in ("train", "holdout"))
    best = int(curve["best_epoch"])
    if not 0 <= best < len(holdout):
        raise ValueError(f"best_epoch {best} of {len(holdout)} losses")
    return Learning(train, holdout, best)


def _end(event: Mapping[str, Any]) -> End:
    return End(
        probe_difference=float(event["probe_difference"]),
        bits_per_weight=float(event["bits_per_weight"]),
        output_bytes=int(event["output_bytes"]),
        seconds=float(event["seconds"]),
        peak_rss_bytes=int(event["peak_rss_bytes"]),
        warnings=tuple(map(str, event.get("warnings", ()))),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
