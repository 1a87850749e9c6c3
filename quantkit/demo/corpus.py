"""The demo model's text: the Python standard library of the running interpreter, split by file.

Three kinds of documents are made: the help topics of ``pydoc_data``, the docstrings of each module set out as prose,
and the source of each module. Everything depends on the library's files and on nothing else, so two machines with the
same Python release get the same text.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["calibration_text", "heldout_files", "heldout_text", "stdlib_folder", "training_documents", "training_files"]

TOPICS_FILE = "pydoc_data/topics.py"

# Tests are repetitive, the bundled applications are not library text, and the rest holds tables or vendored wheels.
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "ensurepip",
        "encodings",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "msilib",
        "site-packages",
        "test",
        "tests",
    }
)
EXCLUDED_FILES = re.compile(r"html/entities\.py|stringprep\.py|_sysconfigdata.*\.py|config-.*")

HELDOUT_PER_MILLE = 35
HELDOUT_FILE_CHARS = 12_000
HELDOUT_CHARS = 200_000
CALIBRATION_CHARS = 250_000
CALIBRATION_EXCERPT_CHARS = 2_500
MIN_DOCSTRING_CHARS = 40


def stdlib_folder() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _library_files(root: Path) -> list[str]:
    """Paths relative to ``root``, with forward slashes, in sorted order."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(
        name
        for name in names
        if EXCLUDED_FOLDERS.isdisjoint(PurePosixPath(name).parts) and not EXCLUDED_FILES.fullmatch(name)
    )


def _is_held_out(name: str) -> bool:
    """A fixed share of the files, chosen by a hash of the path so that the choice outlives a Python release."""
    if name == TOPICS_FILE:
        return False
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELDOUT_PER_MILLE


def training_files(root: Path | None = None) -> list[str]:
    """Files whose text may be trained on, relative to the library folder ``root`` and sorted."""
    return [name for name in _library_files(root or stdlib_folder()) if not _is_held_out(name)]


def heldout_files(root: Path | None = None) -> list[str]:
    """Files kept out of training, relative to the library folder ``root`` and sorted."""
    return [name for name in _library_files(root or stdlib_folder()) if _is_held_out(name)]


def _read(path: Path) -> str:
    """The file's text with a single final newline; empty where the file is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    text = text.strip()
    return f"{text}\n" if text else ""


def _topics(source: str) -> list[str]:
    """One document per help topic of ``pydoc_data/topics.py``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [f"{text.strip()}\n" for _, text in sorted(topics.items())]
    return []


def _docstrings(source: str, module: str) -> str:
    """The module's docstrings as prose, each under the dotted name (and signature) of what it describes."""
    parts: list[str] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{prefix}.{child.name}"
            text = ast.get_docstring(child)
            if text and len(text) >= MIN_DOCSTRING_CHARS:
                signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                parts.append(f"{name}{signature}\n\n{text}\n")
            visit(child, name)

    tree = ast.parse(source)
    opening = ast.get_docstring(tree)
    if opening:
        parts.append(f"{module}\n\n{inspect.cleandoc(opening)}\n")
    visit(tree, module)
    return "\n".join(parts)


def training_documents(root: Path | None = None) -> Iterator[str]:
    """Yield the training documents in a fixed order: for each file its docstrings as prose, then its source."""
    root = root or stdlib_folder()
    for name in training_files(root):
        source = _read(root / name)
        if not source:
            continue
        if name == TOPICS_FILE:
            yield from _topics(source)
            continue
        try:
            prose = _docstrings(source, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        except SyntaxError:
            continue
        if prose:
            yield prose
        yield source


def _opening(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``, cut after a whole line."""
    if len(text) <= limit:
        return text
    return text[: text.rfind("\n", 0, limit) + 1]


def heldout_text(root: Path | None = None) -> str:
    """The openings of the held-out files, so that no single file decides the perplexity."""
    root = root or stdlib_folder()
    openings = (_opening(_read(root / name), HELDOUT_FILE_CHARS) for name in heldout_files(root))
    return _opening("\n".join(text for text in openings if text), HELDOUT_CHARS)


def calibration_text(root: Path | None = None) -> str:
    """Excerpts of training documents, taken at an even spacing over all the training text."""
    everything = "\n".join(training_documents(root))
    count = CALIBRATION_CHARS // CALIBRATION_EXCERPT_CHARS
    excerpts: list[str] = []
    for index in range(count):
        start = everything.find("\n", index * len(everything) // count) + 1
        excerpts.append(_opening(everything[start : start + CALIBRATION_EXCERPT_CHARS], CALIBRATION_EXCERPT_CHARS - 1))
    return "\n".join(excerpts)
