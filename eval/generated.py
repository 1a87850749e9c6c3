"""The tables of the README files that are made of ``eval/results``: ``make tables``, and a check that they still are.

    python -m quantkit.eval.generated --check

A table stands between two lines; what is between them is replaced:

    <!-- table: weights -->
    <!-- /table -->
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.errors import QuantkitError
from quantkit.eval.cells import AS_IT_CAME, Cell, read_cells

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
FILES = ("README.md", "eval/results/README.md")
TEXT = "novels"

WEIGHT_METHODS = ("rtn", "hqq", "sinq", "asinq", "awq", "gptq", "awq+gptq")
WEIGHT_SCHEMES = ("W4A16G64", "W3A16G64", "W2A16G64")
ACTIVATION_METHODS = ("rtn", "smoothquant", "os-plus")
ACTIVATION_SCHEMES = ("W8A8", "W6A6", "W4A8")
LEARNED_METHODS = ("rtn", "smoothquant", "os-plus", "omniquant", "affinequant", "hadamard", "flatquant")
LEARNED_SCHEMES = ("W4A4", "W4A4KV4", "W3A3", "W4A8")
LEARNED_WEIGHTS = ("W3A16G64", "W2A16G64")
LEARNED_WEIGHT_METHODS = ("rtn", "hadamard", "omniquant", "affinequant")
FLATQUANT_PARTS = (
    "rtn", "diagonal", "matrices", "diagonal, matrices", "diagonal, clips", "diagonal, matrices, weight clips",
    "flatquant",
)  # fmt: skip
TENSOR_SCHEMES = ("W8A8T", "W6A6T", "W4A8T", "W4A4T")
KV_STREAMED = (
    "int8", "kivi-4bit", "kivi-2bit", "nsnquant-2bit", "nsnquant-2bit paper", "rotation-2bit", "nsnquant-1bit",
    "rotation-1bit",
)  # fmt: skip
KV_ALL_CODES = (
    "kivi-4bit all",
    "kivi-2bit all",
    "nsnquant-2bit all",
    "rotation-2bit",
    "nsnquant-1bit all",
    "rotation-1bit",
)
KV_MODELS = ("bench-llama", "bench-opt")
KV_TEXTS = {"novels": "novels-test", "wikitext2": "wikitext2-test"}
"""In kv.jsonl -> in kv_rival.json."""
_KV_PLACES = [(model, text) for model in KV_MODELS for text in KV_TEXTS]

_BLOCK = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing, fail if something would change")] = False,
) -> None:
    """Write the tables of the README files anew."""
    stale = []
    for name in FILES:
        file = ROOT / name
        before = file.read_text(encoding="utf-8")
        after = with_tables(before, name)
        if after != before:
            stale.append(name)
            if not check:
                file.write_text(after, encoding="utf-8")
    if check and stale:
        print(f"tables of {', '.join(stale)} are not what eval/results says: run `make tables`.")
        raise typer.Exit(1)


def with_tables(text: str, where: str) -> str:
    """``text`` with every table as the results say.

    Args:
        where: it is from.

    Raises:
        QuantkitError: a table that there is not, a beginning without an end, or a cell that was not measured.
    """
    blocks = list(_BLOCK.finditer(text))
    if len(blocks) != text.count("<!-- table: ") or len(blocks) != text.count("<!-- /table -->"):
        raise QuantkitError(f"{where}: each '<!-- table: NAME -->' needs its '<!-- /table -->' behind it.")
    for block in blocks:
        if block["name"] not in TABLES:
            raise QuantkitError(f"{where}: there is no table '{block['name']}'; known: {', '.join(TABLES)}.")
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}\n{block[3]}", text)


def best_of(
    heading: str,
    file: str,
    methods: Sequence[str],
    columns: Sequence[tuple[str, str, str]],
    text: str = TEXT,
    gaps: bool = False,
) -> str:
    """Perplexities to four digits or more, methods down; the lowest of a column in bold, unless all are the same.

    Args:
        file: of ``eval/results``.
        columns: (heading, model, scheme).
        gaps: what is not in the file is left empty.

    Raises:
        QuantkitError: a cell is not in the file, or failed.
    """
    cells = read_cells(RESULTS / file)

    def value(method: str, model: str, scheme: str) -> float:
        found = cells.get(Cell(model, method, scheme), {}).get("texts", {}).get(text)
        if found is None:
            if gaps:
                return math.inf
            raise QuantkitError(f"eval/results/{file} has no {method} {scheme} of {model} on {text}.")
        return float(found["perplexity"])

    down = [_column([value(method, model, scheme) for method in methods]) for _, model, scheme in columns]
    lines = [[heading, *(name for name, _, _ in columns)]]
    lines += [[f"`{method}`", *row] for method, row in zip(methods, zip(*down, strict=True), strict=True)]
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _column(values: Sequence[float]) -> list[str]:
    shown = [_perplexity(value) for value in values]
    best = {text for text, value in zip(shown, values, strict=True) if value == min(values)}
    return [f"**{text}**" if text in best and len(set(shown)) > 1 else text for text in shown]


def _perplexity(value: float) -> str:
    """Empty: infinite, which stands for what was not measured."""
    if value >= 1000:
        return "" if math.isinf(value) else f"{value:.0f}"
    return f"{value:#.4g}".removesuffix(".")


def _side_by_side(model: str, harder: str, schemes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Columns of a model and of its copy that is harder to quantise; headings leave the groups of 64 away.

    Args:
        harder: what is behind the model's name in that of the copy.
    """
    return [
        (f"{before}{scheme.removesuffix('A16G64')}", name, scheme)
        for before, name in (("", model), (f"{harder}, ", f"{model} {harder}"))
        for scheme in schemes
    ]


def _weights(model: str, text: str = TEXT) -> str:
    columns = _side_by_side(model, "spread", WEIGHT_SCHEMES)
    return best_of("weights in groups of 64", "weights.jsonl", WEIGHT_METHODS, columns, text)


def _activations(model: str, heading: str = "activations, too", schemes: Sequence[str] = ACTIVATION_SCHEMES) -> str:
    columns = _side_by_side(model, "outliers", schemes)
    return best_of(heading, "activations.jsonl", ACTIVATION_METHODS, columns)


def _four_bits(text: str = TEXT) -> str:
    columns = _side_by_side("bench-llama", "outliers", ("W4A4",))
    return best_of("weights and activations of 4 bits", "learned.jsonl", LEARNED_METHODS, columns, text)


def _learned(model: str, schemes: Sequence[str], methods: Sequence[str] = LEARNED_METHODS) -> str:
    both = [way for method in methods for way in (method, "gptq" if method == "rtn" else f"{method}+gptq")]
    columns = [(scheme.removesuffix("A16G64"), model, scheme) for scheme in schemes]
    if "A16" not in schemes[0]:
        columns += [(f"outliers, {scheme}", f"{model} outliers", scheme) for scheme in schemes]
    return best_of("transform, rounding", "learned.jsonl", both, columns, gaps=True)


def _blimp() -> str:
    rows = json.loads((RESULTS / "blimp.json").read_text(encoding="utf-8"))["rows"]
    same = {True: "the same", False: "another"}
    lines = [["bench-llama", "sets", "pairs", "accuracy", "plain lm-eval"]]
    for row in rows:
        counts = [str(row["sets"]), f"{row['pairs']:,}"]
        lines.append([f"`{row['model']}`", *counts, f"{row['accuracy']:.2%}", same[row["equal"]]])
    return _table(lines)


def _caches(model: str) -> str:
    """How many times smaller than in bfloat16 a cache is, of the shape of one layer of ``model``."""
    rows = json.loads((RESULTS / "bench_kv.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["kv"], row["context"]): row for row in rows if row["model"] == model and row["kv"] != "none"}
    contexts = sorted({context for _, context in found})
    lines = [["keys and values", *(f"{context:,} tokens" for context in contexts), "bits per element"]]
    for kv in dict.fromkeys(kv for kv, _ in found):
        smaller = [f"{found[kv, context]['times_smaller']:.2f}" for context in contexts]
        lines.append([f"`{kv}`", *smaller, f"{found[kv, contexts[-1]]['bits_per_element']:.2f}"])
    return _table(lines)


def _kv_perplexities(names: Sequence[str], rival: bool = False) -> str:
    """Of both models on both texts, caches down, all with weights as they came; empty: not measured.

    Args:
        rival: those of kv_rival.json, too.
    """
    cells = read_cells(RESULTS / "kv.jsonl")
    lines = [["keys and values", "bits", "read from codes", *(f"{model}, {text}" for model, text in _KV_PLACES)]]
    for kv in ("", *names):
        of = {model: cells.get(Cell(model, AS_IT_CAME, "", kv), {}) for model in KV_MODELS}
        facts = next((line for line in of.values() if "bits_of_codes" in line), None)
        start = [f"{facts['bits_of_codes']:.2f}", f"{facts['read_from_codes']:.0%}"] if facts else ["", ""]
        lines.append(
            [f"`{kv or 'none'}`", *start, *(_shown(of[model].get("texts", {}).get(text)) for model, text in _KV_PLACES)]
        )
    return _table([*lines, *(_rivals() if rival else [])])


def _rivals() -> list[list[str]]:
    rows = json.loads((RESULTS / "kv_rival.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["kind"], row["fit"], row["model"], row["text"]): row for row in rows}
    bits = {(row["kind"], row["fit"]): f"{row['bits']:.2f}" for row in rows}
    return [
        [f"`{kind}` from {fit}", shown, "100%"]
        + [_shown(found.get((kind, fit, model, KV_TEXTS[text]))) for model, text in _KV_PLACES]
        for (kind, fit), shown in bits.items()
    ]


def _shown(measured: Mapping[str, Any] | None) -> str:
    return _perplexity(measured["perplexity"]) if measured else ""


def _kv_generation() -> str:
    """Tokens in front of the first that differs."""
    rows = json.loads((RESULTS / "kv_generation.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        ["model", "keys and values", "read from codes", "prompts", "tokens written", "the same at first", "throughout"]
    ]
    for row in rows:
        share, matched = f"{row['read_from_codes']:.0%}", f"{row['matched']:.1f}"
        counts = [str(row["prompts"]), str(row["new_tokens"])]
        lines.append([row["model"], f"`{row['kv']}`", share, *counts, matched, str(row["identical"])])
    return _table(lines)


TABLES: dict[str, Callable[[], str]] = {
    "weights": lambda: _weights("bench-llama"),
    "weights bench-llama wikitext2": lambda: _weights("bench-llama", "wikitext2"),
    "weights bench-opt": lambda: _weights("bench-opt"),
    "weights bench-opt wikitext2": lambda: _weights("bench-opt", "wikitext2"),
    "activations": lambda: _activations("bench-llama"),
    "four bits": _four_bits,
    "caches": lambda: _caches("llama-3-8b"),
    "caches of heads of 64": lambda: _caches("llama-1b"),
    "kv perplexities": lambda: _kv_perplexities(KV_STREAMED),
    "kv rival": lambda: _kv_perplexities(KV_ALL_CODES, rival=True),
    "kv generation": _kv_generation,
    "four bits wikitext2": lambda: _four_bits("wikitext2"),
    "learned bench-llama": lambda: _learned("bench-llama", LEARNED_SCHEMES),
    "learned bench-opt": lambda: _learned("bench-opt", LEARNED_SCHEMES),
    "learned weights bench-llama": lambda: _learned("bench-llama", LEARNED_WEIGHTS, LEARNED_WEIGHT_METHODS),
    "learned weights bench-opt": lambda: _learned("bench-opt", LEARNED_WEIGHTS, LEARNED_WEIGHT_METHODS),
    "flatquant parts": lambda: best_of(
        "of flatquant", "flatquant.jsonl", FLATQUANT_PARTS, [("outliers, W4A4", "bench-llama outliers", "W4A4")]
    ),
    "blimp": _blimp,
    "activations bench-opt": lambda: _activations("bench-opt"),
    "activations per tensor": lambda: _activations("bench-llama", "activations, per tensor", TENSOR_SCHEMES),
    "activations per tensor bench-opt": lambda: _activations("bench-opt", "activations, per tensor", TENSOR_SCHEMES),
}
"""Name between the marks -> what belongs there; perplexities are on novels unless it says otherwise."""

if __name__ == "__main__":
    typer.run(main)
