"""What ``quantkit eval`` found, as tables and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.cli.console import print_json, table
from quantkit.cli.loaded import cache_as_json, cache_in_words

if TYPE_CHECKING:
    from quantkit.eval.fidelity import Divergence, Fidelity, WorstWindow
    from quantkit.eval.perplexity import Perplexity
    from quantkit.eval.zero_shot import ZeroShot
    from quantkit.kv.cache import KVCache

TASK_RESULTS = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
"""What lm-eval says of tasks; the rest of its results is about the machine, and in the file of --output-path."""

SHOWN = 60
"""Characters of a window in front of its worst token."""


@dataclass
class Found:
    """Everything that one call measured; what was not asked for is empty."""

    model: str
    baseline: str | None = None
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    """By name of the text, as the next."""
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    tasks: ZeroShot | None = None
    baseline_tasks: ZeroShot | None = None
    cache: KVCache | None = None
    how_read: dict[str, Any] = field(default_factory=dict)
    """Of ``quantkit.eval.kv_memory``, for the longest windows."""
    kv_read: str = ""
    """Of ``read_in_words``."""


def show(found: Found, *, as_json: bool) -> None:
    """Print it on stdout."""
    if as_json:
        print_json(as_json_content(found))
        return
    if found.fidelity:
        _show_fidelity(found.fidelity)
    elif found.perplexity:
        _show_perplexity(found.perplexity)
    if found.tasks:
        _show_tasks(found.tasks, found.baseline_tasks)
    if found.cache is not None:
        print(cache_in_words(found.cache))
        print(f"{100 * found.how_read['read_from_codes']:.1f} % of the keys and values that tokens read are codes")
    elif found.kv_read:
        print(found.kv_read)


def as_json_content(found: Found) -> dict[str, Any]:
    """What ``--json`` prints and a report is made of."""
    return dict(_finite(_json(found)))


def _json(found: Found) -> dict[str, Any]:
    result: dict[str, Any] = {"model": found.model}
    if found.perplexity:
        result["perplexity"] = {name: asdict(one) for name, one in found.perplexity.items()}
    if found.tasks:
        result["tasks"] = {key: found.tasks.results[key] for key in TASK_RESULTS if key in found.tasks.results}
        result["tied_questions"] = found.tasks.ties()
    if found.baseline is not None:
        result["baseline"] = found.baseline
    if found.fidelity:
        result["fidelity"] = {name: asdict(one) | _ratio(one) for name, one in found.fidelity.items()}
    if found.tasks and found.baseline_tasks:
        theirs = found.baseline_tasks.results
        result["baseline_tasks"] = {key: theirs[key] for key in TASK_RESULTS if key in theirs}
        changes = found.tasks.changes(found.baseline_tasks)
        result["task_changes"] = [
            {"task": task, "metric": metric, **change._asdict()} for (task, metric), change in changes.items()
        ]
    result |= cache_as_json(found.cache)
    if found.kv_read:
        result["kv_read"] = {"how": found.kv_read, **found.how_read}
    return result


def _ratio(one: Fidelity) -> dict[str, Any]:
    """``asdict`` would make a list of it."""
    if one.divergence is None:
        return {}
    return {"divergence": asdict(one.divergence) | {"perplexity_ratio": one.divergence.perplexity_ratio._asdict()}}


def _finite(value: Any) -> Any:
    """JSON has no infinity, which a thoroughly broken model reaches, and no NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _show_perplexity(results: dict[str, Perplexity]) -> None:
    rows = [[name, f"{one.value:.4f}", str(one.tokens), str(one.seqlen)] for name, one in results.items()]
    table(["text", "perplexity", "tokens", "seqlen"], rows, right=("perplexity", "tokens", "seqlen"))
    for name, result in results.items():
        print(f"{name}: {result.protocol}")


def _show_fidelity(results: dict[str, Fidelity]) -> None:
    columns = ["text", "perplexity", "baseline", "ratio", "95 % interval", "KL", "top-1 agreement", "tokens", "seqlen"]
    rows = []
    for name, one in results.items():
        found = one.divergence
        compared = ["", "", "", ""]
        if found:
            ratio = found.perplexity_ratio
            interval = f"{ratio.low:.4f} .. {ratio.high:.4f}"
            compared = [f"{ratio.value:.4f}", interval, f"{found.kl:.3g}", f"{found.top1_agreement:.2%}"]
        of, beside = one.perplexity, one.baseline_perplexity
        rows.append([name, f"{of.value:.4f}", f"{beside.value:.4f}", *compared, str(of.tokens), str(of.seqlen)])
    table(columns, rows, right=columns[1:])
    for name, one in results.items():
        print(f"{name}: {one.perplexity.protocol}")
        print(f"{name}: {one.bits_per_byte:.4f} bits per byte, baseline {one.baseline_bits_per_byte:.4f}")
        if one.divergence is None:
            print(f"{name}: no KL divergence, because {one.why_not}; compare the bits per byte")
        else:
            _show_divergence(name, one.divergence)


def _show_divergence(name: str, found: Divergence) -> None:
    print(f"{name}: KL(baseline || model) {found.kl:.3g} nats per token, 99 % below {found.kl_99:.3g}")
    if made := found.generation:
        print(
            f"{name}: greedy continuations agree for {made.matched:.1f} of {made.new_tokens} tokens, "
            f"{made.identical} of {made.prompts} throughout"
        )
    for window in found.worst:
        print(f"{name}: {_worst(window)}")


def _worst(window: WorstWindow) -> str:
    before = window.text if len(window.text) <= SHOWN else f"...{window.text[-SHOWN:]}"
    return (
        f"window {window.number} has KL {window.kl:.3g}, perplexity {window.perplexity:.2f}, baseline "
        f"{window.baseline_perplexity:.2f}; most behind {before!r}, where {window.token!r} follows, the baseline "
        f"expects {window.baseline_says!r} and the model {window.model_says!r}"
    )


def _show_tasks(tasks: ZeroShot, baseline: ZeroShot | None) -> None:
    columns = ["task", "metric", "value", "stderr", "documents", "shots"]
    columns += ["baseline", "change", "95 % interval"] if baseline else []
    theirs = {(one.task, one.metric): one.value for one in baseline.scores()} if baseline else {}
    changes = tasks.changes(baseline) if baseline else {}
    rows = []
    for one in tasks.scores():
        stderr = "" if one.stderr is None else f"{one.stderr:.4f}"
        shots = "" if one.shots is None else str(one.shots)
        row = [one.task, one.metric, f"{one.value:.4f}", stderr, str(one.documents or ""), shots]
        if baseline:
            key = (one.task, one.metric)
            change = changes.get(key)
            row += [f"{theirs[key]:.4f}", f"{one.value - theirs[key]:+.4f}"] if key in theirs else ["", ""]
            row += [f"{change.low:+.4f} .. {change.high:+.4f}" if change else ""]
        rows.append(row)
    table(columns, rows, right=columns[2:])
    if ties := tasks.ties():
        print(
            f"{ties} questions have several likeliest answers, of which lm-eval takes the first: these log-likelihoods "
            "are coarse; --softmax-dtype float32, or --dtype float32, tells them apart"
        )
