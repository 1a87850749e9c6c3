"""What a run record says, in a few lines and block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Event = Mapping[str, Any]


def block_events(record: Iterable[Event]) -> list[Event]:
    """The lines about blocks, in model order."""
    return sorted((event for event in record if "block" in event), key=lambda event: event["block"])


def summarise(record: Iterable[Event]) -> list[str]:
    """One line for each method that had something to say, and one about time and memory."""
    record = list(record)
    blocks = block_events(record)
    if not blocks:
        return []
    facts = [fact for event in blocks for fact in event.get("transforms", ())]
    lines = [f"residual stream: {event['residual']}" for event in record if event.get("residual")]
    lines += [_of_transform(name, [f for f in facts if f["method"] == name]) for name in _names(facts)]
    lines += _of_rounding([row for event in blocks for row in event["layers"]])
    lines += _of_tuning([event["tuning"] for event in blocks if event.get("tuning")])
    slowest = max(blocks, key=lambda event: event["seconds"])
    seconds = [event["seconds"] for event in blocks]
    lines.append(
        f"blocks: {median(seconds):.1f} s each (median), slowest {slowest['block']} with {slowest['seconds']:.1f} s"
    )
    return lines


def block_rows(record: Iterable[Event]) -> tuple[list[str], list[list[str]]]:
    """(headings, a row per block): time, memory, weight error, what transforms and tuning won."""
    heads = ["block", "seconds", "peak memory", "weight error", "transforms", "tuning"]
    rows = []
    for event in block_events(record):
        errors = [row["error"] for row in event["layers"]]
        tuned = event.get("tuning") or {}
        rows.append(
            [
                str(event["block"]),
                f"{event['seconds']:.1f}",
                f"{event['peak_rss_bytes'] / 1e6:.0f} MB",
                f"{median(errors):.2%}" if errors else "-",
                _change(event.get("transforms", ())),
                ("kept, " if tuned.get("accepted") else "reverted, ") + _change([tuned]) if tuned else "-",
            ]
        )
    return heads, rows


def _names(facts: Iterable[Event]) -> list[str]:
    return list(dict.fromkeys(fact["method"] for fact in facts))


def _change(facts: Iterable[Event]) -> str:
    """Median loss before and after."""
    pairs = [(fact["loss_before"], fact["loss"]) for fact in facts if "loss" in fact and "loss_before" in fact]
    if not pairs:
        return "-"
    before, after = (median(values) for values in zip(*pairs, strict=True))
    return f"{before:.3g} -> {after:.3g}"


def _of_transform(name: str, facts: Sequence[Event]) -> str:
    learned = [fact for fact in facts if "accepted" in fact]
    if learned:  # one such line per block, beside those of its places
        text = f"{name}: {_kept(learned)}"
    else:
        changed = sum(1 for fact in facts if fact.get("loss", 0) < fact.get("loss_before", 1))
        change = _change(facts)
        text = f"{name}: {changed} of {len(facts)} places changed"
        text += "" if change == "-" else f", error of the quantised output {change} (median)"
    scales = [fact[key] for fact in facts for key in ("scale_min", "scale_max") if key in fact]
    return text + (f", scales {min(scales):.3g} to {max(scales):.3g}" if scales else "")


def _of_rounding(rows: Sequence[Event]) -> list[str]:
    dampings = [row["damping"] for row in rows if row.get("damping") is not None]
    fallen = [row for row in rows if row.get("fallback")]
    if not dampings and not fallen:
        return []
    text = f"rounding: {len(dampings)} linears by their Hessian"
    if dampings:
        text += f", damping {min(dampings):g} to {max(dampings):g}"
    if fallen:
        text += f"; {len(fallen)} to nearest, the first {fallen[0]['layer']}: {fallen[0]['fallback']}"
    return [text]


def _of_tuning(tunings: Sequence[Event]) -> list[str]:
    return [f"{tunings[0]['method']}: {_kept(tunings)}"] if tunings else []


def _kept(facts: Sequence[Event]) -> str:
    """What came of learning, a fact per block."""
    text, change = f"kept in {sum(bool(fact['accepted']) for fact in facts)} of {len(facts)} blocks", _change(facts)
    return text if change == "-" else f"{text}, hold-out loss {change} (median)"
