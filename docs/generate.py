"""What pages of the documentation take from the code: options, commands, figures. A hook of mkdocs (mkdocs.yml).

A page asks for it where it wants it, by a comment on a line of its own:

    <!-- generated: options sinq -->

The line becomes what the function of that name in ``GENERATORS`` makes of the words behind it, split as a shell would.
Nothing of it is stored, so nothing can go stale; what cannot be made stops the build.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel

from quantkit import registry
from quantkit.cli.main import app
from quantkit.eval.cells import AS_IT_CAME, Cell, read_cells
from quantkit.eval.tables import markdown as table
from quantkit.kv import methods as caches

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval/results"
MARKER = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
NOT_MEASURED = "Nothing of this is among the measured results yet (`eval/results`)."

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://)[^)]+\)")
_COMMENT = re.compile(r"^<!--.*-->$", re.MULTILINE)
_CODE = re.compile(r"(`[^`]*`)")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_BRACKETED = re.compile(r"  \[([^\]]*)\]")
_NUMBERS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_KINDS = {
    "integer": "integer", "number": "number", "boolean": "true, false", "string": "text", "object": "mapping",
    "null": "null",
}  # fmt: skip
_METAVARS = {"int": "integer", "int range": "integer", "float": "number", "float range": "number", "str": "text"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return render(markdown)


def render(markdown: str) -> str:
    """A page with its markers replaced.

    Raises:
        ValueError: a marker that is none of ``GENERATORS``, or asks for what is not there.
    """
    return MARKER.sub(lambda found: _generate(found[1]), markdown)


def _generate(request: str) -> str:
    name, *words = shlex.split(request)
    if name not in GENERATORS:
        raise ValueError(f"nothing generates '{name}'; known: {', '.join(GENERATORS)}")
    named = dict(word.split("=", 1) for word in words if "=" in word)
    return GENERATORS[name](*(word for word in words if "=" not in word), **named)


# --- methods


def methods() -> str:
    """Every method, with a link to its page."""
    rows = [[_page(row.name), row.kind, escape(row.summary), row.needs] for row in registry.METHODS.values()]
    return table([["method", "kind", "what it does", "needs"], *rows])


def cache_methods() -> str:
    """Every way to keep keys and values, with a link to its page."""
    rows = [[_page(row.name), escape(row.summary), escape(row.bits)] for row in caches.CACHE_METHODS.values()]
    return table([["cache", "what it does", "bits per element"], *rows])


def _page(name: str) -> str:
    return f"[`{name}`]({name}.md)"


def facts(name: str) -> str:
    """The row of a method in ``quantkit methods``."""
    if name in caches.CACHE_METHODS:
        cache = caches.CACHE_METHODS[name]
        named = {"What it does": cache.summary, "Paper": cache.paper, "Bits per element": cache.bits}
        named["Names for `--kv`"] = ", ".join(f"`{short}`" for short in cache.short)
    else:
        row = registry.get(name)
        named = {"Kind": row.kind, "What it does": row.summary, "Paper": row.paper, "Needs": row.needs}
        named["Output loads in"] = row.loads_in
    lines = "\n".join(f"- **{head}**: {escape(text)}" for head, text in named.items())
    return _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", lines)


def options(name: str) -> str:
    """The options of a method, of one that a step of a recipe names or of one that ``--kv`` does."""
    if name in caches.CACHE_METHODS:
        return fields_table(caches.CACHE_METHODS[name].settings())
    return fields_table(registry.get(name).load().Config)


def recipe_reference() -> str:
    """Every key of a recipe, from the model that checks it."""
    from quantkit import recipe

    parts = []
    for title, model in (
        ("A recipe", recipe.Recipe),
        ("`scheme`", recipe.Scheme),
        ("`scheme.weights`", recipe.WeightScheme),
        ("`scheme.activations`", recipe.ActivationScheme),
        ("`scheme.kv`", recipe.KVScheme),
        ("`steps`, each", recipe.Step),
        ("`calibration`", recipe.Calibration),
    ):
        parts.append(f"## {title}\n\n{escape(_first_paragraph(model))}\n\n{fields_table(model)}")
    return "\n\n".join(parts)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def fields_table(model: type[BaseModel]) -> str:
    """The fields of a pydantic model: values, default, description; and what ``preset: faithful`` sets."""
    schema = model.model_json_schema()
    properties: dict[str, Any] = schema["properties"]
    required = schema.get("required", ())
    faithful = _faithful(model, properties)
    rows = [["option", "values", "default", *(["`faithful`"] if faithful else []), "what it is"]]
    for name, field in sorted(properties.items(), key=lambda item: item[0] != "preset"):  # that one first
        default = "required" if name in required else value_in_words(field.get("default", {}))
        preset = [value_in_words(faithful[name]) if name in faithful else ""] if faithful else []
        rows.append([f"`{name}`", values_in_words(field), default, *preset, escape(_description(field, schema))])
    return table(rows)


def _description(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The field's own, else that of the model it holds."""
    held = [one["$ref"] for one in (field, *field.get("anyOf", ())) if "$ref" in one]
    inner = schema["$defs"][held[0].rsplit("/", 1)[1]].get("description", "") if held else ""
    text: str = field.get("description") or inner.split("\n\n")[0]
    return " ".join(text.split())


def _faithful(model: type[BaseModel], properties: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset of that name changes."""
    if "faithful" not in properties.get("preset", {}).get("enum", ()):
        return {}
    own, theirs = model().model_dump(), model.model_validate({"preset": "faithful"}).model_dump()
    return {name: theirs[name] for name in own if own[name] != theirs[name] and name != "preset"}


def values_in_words(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in a few words; null goes without saying."""
    if "anyOf" in schema:
        return " or ".join(values_in_words(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "mapping"
    if "prefixItems" in schema:
        return "list of " + "; ".join(values_in_words(one) for one in schema["prefixItems"])
    if schema.get("type") == "array":
        return f"list of {values_in_words(schema['items'])}"
    bounds = [f"{words} {schema[key]:g}" for key, words in _NUMBERS.items() if key in schema]
    bounds += [f"a multiple of {schema['multipleOf']:g}"] if "multipleOf" in schema else []
    return ", ".join([_KINDS[schema["type"]], *bounds])


def value_in_words(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return "see there" if value else "none"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


# --- figures


def figures(file: str, *, methods: str, schemes: str = "", models: str = "", text: str = "novels") -> str:
    """Perplexities that a sweep found: methods down, schemes across, the unquantised model first.

    Args:
        file: of ``eval/results``.
        methods, schemes, models: separated by commas; empty: all schemes, or models, at which one was measured.
        text: name of a text in the file.
    """
    measured = _perplexities(RESULTS / file, text)
    wanted = methods.split(",")
    cells = {cell: ppl for cell, ppl in measured.items() if cell.method in wanted and not cell.kv}
    across = schemes.split(",") if schemes else list(dict.fromkeys(cell.scheme for cell in cells))
    down = models.split(",") if models else list(dict.fromkeys(cell.model for cell in cells))
    rows = []
    for model in down:
        found = [
            [method, *(number(cells.get(Cell(model, method, scheme))) for scheme in across)]
            for method in wanted
            if any(Cell(model, method, scheme) in cells for scheme in across)
        ]
        if found:
            rows.append([model, "as it came", *[number(measured.get(Cell(model, AS_IT_CAME, "")))] * len(across)])
            rows += [["", f"`{method}`", *cells] for method, *cells in found]
    if not rows:
        return NOT_MEASURED
    return f"Perplexity on {text}, from `eval/results/{file}`:\n\n{table([['model', 'method', *across], *rows])}"


def kv_figures(name: str) -> str:
    """Perplexities that any sweep found with the cache ``name``."""
    rows = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        for text in _texts(path):
            measured = _perplexities(path, text)
            for cell, ppl in measured.items():
                if cell.kv in caches.CACHE_METHODS[name].short:
                    before = number(measured.get(Cell(cell.model, AS_IT_CAME, "")))
                    what = f"{cell.method} {cell.scheme}".strip()
                    rows.append([cell.model, what, f"`{cell.kv}`", text, before, number(ppl)])
    if not rows:
        return NOT_MEASURED
    return table([["model", "weights", "cache", "text", "unquantised", "perplexity"], *rows])


def _perplexities(path: Path, text: str) -> dict[Cell, float]:
    return {
        cell: line["texts"][text]["perplexity"]
        for cell, line in read_cells(path).items()
        if text in line.get("texts", {})
    }


def _texts(path: Path) -> list[str]:
    return list(dict.fromkeys(text for line in read_cells(path).values() for text in line.get("texts", {})))


def number(perplexity: float | None) -> str:
    """Two decimals below 100, fewer above; "-" where nothing was measured."""
    if perplexity is None:
        return "-"
    if perplexity >= 10_000:
        return f"{perplexity:.1e}".replace("e+0", "e")
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:.4g}"


def scheme_formats(*names: str) -> str:
    """What becomes of a 4096 x 4096 linear at each scheme: bits per weight, checkpoint format, and why."""
    import torch

    from quantkit.formats.layer import LayerFormat, tensor_specs
    from quantkit.formats.portable import portable_reason
    from quantkit.recipe import Scheme

    rows = [["scheme", "bits per weight", "format", "because it"]]
    size = (4096, 4096)
    for name in names:
        scheme = Scheme.parse(name)
        if scheme.weights is None:
            raise ValueError(f"scheme '{name}' has no weights to store")
        layer = LayerFormat(weights=scheme.weights, activations=scheme.activations)
        specs = tensor_specs(layer, *size, torch.bfloat16)
        bits = sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in specs.values()) / (4096 * 4096)
        reason = "" if (found := portable_reason({"it": layer}, {"it": size})) is None else found.removeprefix("it ")
        if scheme.kv is not None:
            reason = "keeps keys and values in codes, for which compressed-tensors has no field"
        rows.append([f"`{name}`", f"{bits:.2f}", "native" if reason else "`compressed-tensors`", reason.rstrip(".")])
    return table(rows)


def speed(*names: str) -> str:
    """Time and memory of a run by each method, as far as they were measured."""
    measured = json.loads((RESULTS / "bench_quantize.json").read_text(encoding="utf-8"))["memory_and_speed"]
    rows = [
        [
            f"`{run['method']}`", run["scheme"], f"{run['weights'] / 1e6:.0f} M", f"{run['seconds']:.1f} s",
            f"{run['peak_rss_mb']:.0f} MB",
        ]
        for run in measured
        if run["method"] in names
    ]  # fmt: skip
    heads = ["method", "scheme", "weights", "whole run", "peak memory"]
    return f"From `eval/results/bench_quantize.json`, two CPU cores:\n\n{table([heads, *rows])}"


def demo_table() -> str:
    """The bundled model before and after."""
    text = section("eval/results/before_after.md", "demo")
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


# --- files of the repository


def section(file: str, heading: str) -> str:
    """What stands under a heading of a Markdown file, links within the repository as plain text."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    starts = [n for n, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line)]
    if len(starts) != 1:
        raise ValueError(f"{file} has {len(starts)} headings '{heading}', not one")
    start = starts[0]
    level = len(lines[start].split(" ")[0])
    ends = (n for n, line in enumerate(lines) if n > start and re.match(rf"#{{1,{level}}} ", line))
    text = "\n".join(lines[start + 1 : next(ends, None)])
    return _LINK.sub(r"\1", _COMMENT.sub("", text)).strip()


# --- commands


def cli() -> str:
    """Every command with its arguments, options and examples."""
    return "\n\n".join(_command(path, command, context) for path, command, context in commands())


def commands() -> Iterator[tuple[str, Any, Any]]:
    """(``quantkit bench kernels``, its command, a context of it) of each command that is no group."""
    root = typer.main.get_command(app)
    yield from _leaves(root, root.make_context("quantkit", [], resilient_parsing=True))


def _leaves(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    for name, command in group.commands.items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        if hasattr(command, "commands"):
            yield from _leaves(command, inner)
        else:
            yield inner.command_path, command, inner


def _command(path: str, command: Any, context: Any) -> str:
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"## {path}", escape(command.help or ""), f"```\n{usage}\n```"]
    records = [param.get_help_record(context) for param in command.params if not param.hidden]
    rows = [[*_names(names), escape(_BRACKETED.sub(r" (\1)", text))] for names, text in records]
    parts.append(table([["argument or option", "value", "what it is"], *rows]))
    examples = [line for line in (command.epilog or "").splitlines() if line.startswith("quantkit")]
    parts += ["```\n" + "\n".join(examples) + "\n```"] if examples else []
    return "\n\n".join(parts)


def _names(record: str) -> tuple[str, str]:
    """``-o, --output <path>`` -> its names as code, and what kind of value follows; ``MODEL <str>`` likewise."""
    found = re.fullmatch(r"((?:-[\w-]+,? ?/? ?)+|\S+) ?(.*)", record)
    if found is None:
        raise ValueError(f"a parameter of the command line reads '{record}'")
    value = re.sub(r"list\[(\w+)\]", r"\1", found[2].strip("<>"))
    names = ", ".join(f"`{name}`" for name in re.split(r", | ?/ ?", found[1].strip()))
    return names, _METAVARS.get(value, escape(value.replace("|", ", ")))


def escape(text: str) -> str:
    """Plain text as Markdown for a table, `code` in it left as it is."""
    parts: Sequence[str] = _CODE.split(text)
    return "".join(part if part.startswith("`") else _escape_plain(part) for part in parts)


def _escape_plain(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", text).replace("<", "&lt;").replace("|", "&#124;")


GENERATORS: dict[str, Callable[..., str]] = {
    "methods": methods, "caches": cache_methods, "facts": facts, "options": options, "recipe": recipe_reference,
    "figures": figures, "kv-figures": kv_figures, "schemes": scheme_formats, "section": section, "cli": cli,
    "speed": speed, "demo-table": demo_table,
}  # fmt: skip
