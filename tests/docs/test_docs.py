"""The documentation against the code: pages, commands, options, recipes and links that it names are there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from quantkit.cli.main import app
from quantkit.kv.methods import CACHE_METHODS
from quantkit.recipe import build_recipe
from quantkit.registry import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def generate() -> ModuleType:
    """``docs/generate.py``, which is no package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rendered(generate: ModuleType) -> dict[str, str]:
    """Every page as it is built, by its path in ``docs``."""
    return {str(path.relative_to(DOCS)): generate.render(path.read_text(encoding="utf-8")) for path in PAGES}


@pytest.fixture(scope="session")
def known_options(generate: ModuleType) -> set[str]:
    return {
        name
        for _, command, _ in generate.commands()
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
    }


def test_nothing_is_left_to_generate(rendered: dict[str, str]) -> None:
    assert [name for name, text in rendered.items() if "<!-- generated" in text] == []


@pytest.mark.parametrize("name", [*METHODS, *CACHE_METHODS])
def test_a_method_has_a_page_with_its_paper_and_options(name: str, rendered: dict[str, str]) -> None:
    text = rendered[f"methods/{name}.md"]
    row = METHODS.get(name) or CACHE_METHODS[name]
    for paper in re.findall(r"\d{4}\.\d{5}", row.paper):
        assert f"https://arxiv.org/abs/{paper}" in text
    assert re.sub(r", arXiv .*", "", row.paper) in text
    fields = METHODS[name].load().Config if name in METHODS else CACHE_METHODS[name].settings()
    options = set(re.findall(r"^\| `(\w+)` ", text.partition("## Options")[2], re.MULTILINE))
    assert set(fields.model_fields) <= options
    for heading in ("Idea", "When to use it", "What it costs", "Options", "Figures"):
        assert f"\n## {heading}\n" in text
    assert "**Quoted**" in text or name == "hqq"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


def test_every_command_and_option_is_in_the_reference(generate: ModuleType, rendered: dict[str, str]) -> None:
    paths = []
    for path, command, _ in generate.commands():
        paths.append(path)
        text = rendered["cli.md"].partition(f"## {path}\n")[2].partition("\n## ")[0]
        for param in command.params:
            if param.param_type_name == "option":
                assert all(f"`{name}`" in text for name in (*param.opts, *param.secondary_opts)), (path, param.name)
    assert {"quantkit quantize", "quantkit eval", "quantkit bench kernels"} <= set(paths)


def test_every_key_of_a_recipe_is_in_the_reference(rendered: dict[str, str]) -> None:
    for name in ("scheme", "steps", "group_size", "granularity", "key_transform", "nsamples", "options"):
        assert re.search(rf"^\| `{name}` ", rendered["recipes.md"], re.MULTILINE), name


def _line(method: str, scheme: str, perplexity: float, kv: str = "") -> str:
    line = {"model": "m", "method": method, "scheme": scheme, "texts": {"novels": {"perplexity": perplexity}}}
    return json.dumps(line | ({"kv": kv} if kv else {})) + "\n"


def test_figures_come_from_the_files(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    lines = [_line("as it came", "", 10.5), _line("rtn", "W4A16G64", 11.25), _line("sinq", "W3A16G64", 123.45)]
    (tmp_path / "x.jsonl").write_text("".join([*lines, _line("rtn", "W4A16G64", 12, "kivi-2bit")]))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _table(generate.figures, "x.jsonl")]
    assert cells == [
        ["model", "method", "W4A16G64", "W3A16G64"],
        ["m", "as it came", "10.50", "10.50"],
        ["", "`rtn`", "11.25", "-"],
        ["", "`sinq`", "-", "123.5"],
    ]
    assert generate.figures("x.jsonl", methods="gptq") == generate.NOT_MEASURED
    assert "| m     | rtn W4A16G64 | `kivi-2bit` | novels | 10.50       | 12.00      |" in generate.kv_figures("kivi")
    assert generate.kv_figures("nsnquant") == generate.NOT_MEASURED


def _table(figures: Callable[..., str], file: str) -> list[str]:
    lines = figures(file, methods="rtn,sinq").splitlines()
    return [line for line in lines if line.startswith("|") and "---" not in line]


# --- what is shown as a command


def _blocks(text: str) -> Iterator[str]:
    """Code of a page: fenced, or four columns in."""
    yield from re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield "\n".join(line[4:] for line in plain.splitlines() if line.startswith("    "))


def _commands(text: str) -> Iterator[list[str]]:
    """Every ``quantkit ...`` in the code of a page, in words."""
    for block in _blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|>&")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # other languages have other quotes
                continue
            if words[:1] == ["quantkit"]:
                end = next((n for n, word in enumerate(words) if word[0] in ";|>&"), len(words))
                yield words[:end]


@cache
def _root() -> Any:
    return typer.main.get_command(app)


def _parse(words: list[str]) -> None:
    """Like the command line, without running the command."""
    command = _root()
    context = command.make_context("quantkit", [], resilient_parsing=True)
    rest = words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
        last = not hasattr(command, "commands")
        context = command.make_context(name, list(rest) if last else [], parent=context, resilient_parsing=not last)


@pytest.mark.parametrize("path", WRITTEN, ids=_relative)
def test_commands_that_are_shown_exist(path: Path, rendered: dict[str, str]) -> None:
    text = rendered[str(path.relative_to(DOCS))] if path in PAGES else path.read_text(encoding="utf-8")
    for words in _commands(text):
        if "[OPTIONS]" not in words:  # a usage line
            _parse(words)


def test_a_wrong_command_would_be_noticed() -> None:
    shown = list(
        _commands("```\nquantkit eval out --pql demo  # no\n```\n\n    quantkit evil out; quantkit eval out\n")
    )
    assert shown == [["quantkit", "eval", "out", "--pql", "demo"], ["quantkit", "evil", "out"]]
    with pytest.raises(Exception, match="--pql"):
        _parse(shown[0])
    with pytest.raises(KeyError, match="evil"):
        _parse(shown[1])


@pytest.mark.parametrize("path", PAGES, ids=_relative)
def test_options_that_are_named_exist(path: Path, known_options: set[str]) -> None:
    named = re.findall(r"`(--[\w-]+)", path.read_text(encoding="utf-8"))
    assert set(named) <= known_options | {"--help"}


@pytest.mark.parametrize("path", PAGES, ids=_relative)
def test_recipes_and_programs_that_are_shown_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for recipe in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for step in build_recipe(yaml.safe_load(recipe), _relative(path)).steps:
            METHODS[step.method].load().Config.model_validate(step.options)
    for program in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        compile(program, str(path), "exec")


@pytest.mark.parametrize("path", WRITTEN, ids=_relative)
def test_links_lead_to_files(path: Path) -> None:
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert missing == []
