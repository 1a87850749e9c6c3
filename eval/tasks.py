"""The tasks of lm-eval, found by name; with ``data`` their data sets are read from a folder instead of the hub.

What a task asks and how it is scored is lm-eval's own definition in either case: only the source of the documents is
replaced, through lm-eval's own way of overriding a task (a YAML file that includes the task's).
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import io
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, RecipeError

FILE_TYPES = {".jsonl": "json", ".parquet": "parquet"}
"""Ending of a local file -> the builder of the datasets library that reads it."""

_USES = ("fewshot_split", "training_split", "validation_split", "test_split")
"""What a task uses splits for; its examples are from the first that it has."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their documents, ready to be asked; any number of models can be."""

    manager: Any
    """lm-eval's ``TaskManager`` that made them."""
    chosen: tuple[Any, ...]
    """A ``Task`` or ``Group`` for every name; a tag became its tasks."""
    no_examples: Mapping[str, str]
    """Task -> the split of its few-shot examples, for those whose local data set is without it."""


def load_tasks(names: Sequence[str], *, include_path: Path | None = None, data: Path | None = None) -> Tasks:
    """Find tasks and read their data sets.

    Args:
        names: tasks, groups and tags of lm-eval, or patterns of them such as ``blimp_*``.
        include_path: folder with more task definitions; they win over lm-eval's of the same name. Data sets may be
            beside them: without ``data`` they are looked for there.
        data: folder of local data sets. That of a task with data set ``PATH`` and config ``NAME`` is ``NAME`` or
            ``PATH/NAME`` (without a config: ``PATH``; of a PATH such as ``nyu-mll/blimp`` the last part): a .jsonl or
            .parquet file that holds the documents the task asks about, or a folder with such a file per split.

    Raises:
        RecipeError: no such task or folder, a task that is not one for language models alone, or nothing in ``data``
            belongs to any of them.
        QuantkitError: lm-eval is not installed, or a data set is neither in ``data`` nor in the local cache and the hub
            cannot be reached.
    """
    for option, folder in (("--include-path", include_path), ("--data", data)):
        if folder is not None and not folder.is_dir():
            raise RecipeError(f"{option} {folder} is no folder; give the folder that holds the files.")
    require_lm_eval()
    with quiet_lm_eval(), tempfile.TemporaryDirectory() as scratch:
        library = _Library()
        manager = _manager(library, names, include_path)
        found = _resolve(library, manager, names)
        beside = data or include_path
        local = _use_local_data(manager, found, beside, Path(scratch)) if beside else {}
        if data and not local:
            raise RecipeError(f"--data {data} has no data set for {_example(manager.task_index, found)}.")
        chosen = [item for name in found for item in _build(manager, name, local)]
    _check_usable(chosen)
    return Tasks(manager, tuple(chosen), {task: split for task, split in local.items() if split})


def require_lm_eval() -> None:
    """Raises:
    QuantkitError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise QuantkitError("tasks are lm-eval's, which is not installed; `pip install 'quantkit[eval]'`.") from None


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval prints hints on stdout and draws bars of its own: neither, while this is entered."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bar = tqdm.__init__

    def no_bar(self: Any, *args: Any, **options: Any) -> None:
        bar(self, *args, **options | {"disable": True})

    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        tqdm.__init__ = no_bar
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Library:
    """The text of every task definition that lm-eval comes with.

    Parsing all of these 14,000 YAML files takes lm-eval a quarter of a minute, on a busy machine more than one; reading
    them takes a second. So names are looked for in their text, and only the folders in which they stand are parsed.
    """

    def __init__(self) -> None:
        import lm_eval.tasks

        self._root = Path(lm_eval.tasks.__file__).parent

    @functools.cached_property
    def _texts(self) -> dict[Path, list[str]]:
        """Folder -> its files. Templates end in anything, or in nothing."""
        texts: dict[Path, list[str]] = {}
        for path in self._root.glob("*/**/*"):
            if path.suffix in ("", ".yaml", ".yml") and path.is_file():
                folder = self._root / path.relative_to(self._root).parts[0]
                texts.setdefault(folder, []).append(path.read_text(encoding="utf-8", errors="replace"))
        return texts

    def folders(self, names: Iterable[str]) -> set[Path]:
        """The folders in which one of the names (or of the letters of a pattern) stands."""
        words = "|".join(_words(name) for name in names)
        search = re.compile(words).search
        return {folder for folder, texts in self._texts.items() if any(search(text) for text in texts)}

    def names(self) -> set[str]:
        """About all names there are: good enough to suggest one."""
        named = re.compile(r"""["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([\w.\-]+)""")
        return {name for texts in self._texts.values() for text in texts for name in named.findall(text)}


def _words(name: str) -> str:
    """A regular expression that finds ``name``, or the longest part of a pattern that is literal, in a text."""
    if not _is_pattern(name):
        return rf"(?<!\w){re.escape(name)}(?!\w)"
    return re.escape(max(re.split(r"[*?\[\]]", name), key=len))


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _manager(library: _Library, names: Sequence[str], include_path: Path | None) -> Any:
    """A ``TaskManager`` that knows every task in ``names``, and what is in their groups."""
    from lm_eval.tasks import TaskManager

    searched: set[str] = set()
    wanted = set(names)
    folders: set[Path] = set()
    while True:
        folders |= library.folders(wanted - searched)
        searched |= wanted
        # Of two definitions lm-eval takes the first inside one folder and the last of several: hence backwards.
        paths = [*sorted(folders, reverse=True), *([include_path] if include_path else [])]
        manager = TaskManager(include_defaults=False, include_path=paths)
        wanted = {leaf for name in _expand(manager, names) for leaf in leaves(manager.task_index, name)}
        wanted -= manager.task_index.keys() | searched
        if not wanted:
            return manager


def _expand(manager: Any, names: Sequence[str]) -> list[str]:
    """Names of the index in place of patterns, each once, in the order given."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys(fnmatch.filter(manager.all_tasks, name) if _is_pattern(name) else [name])
    return list(found)


def leaves(index: Mapping[str, Any], item: str | Mapping[str, Any]) -> Iterator[str]:
    """The names of the single tasks in ``item``: the name of a task, group or tag, or a member of a group.

    A name that is in no group and not in ``index`` is given back as it is.
    """
    if not isinstance(item, str):
        name, members = item.get("group"), item.get("task")
        if isinstance(members, str):
            yield from leaves(index, members)
        elif name in index:
            yield from leaves(index, str(name))
        else:
            for member in members or ():
                yield from leaves(index, member)
        return
    entry = index.get(item)
    if entry is not None and entry.kind.name == "GROUP":
        members = entry.cfg.get("task") or []
        for member in [members] if isinstance(members, str) else members:
            yield from leaves(index, member)
    elif entry is not None and entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    else:
        yield item


def _resolve(library: _Library, manager: Any, names: Sequence[str]) -> list[str]:
    """As ``_expand``, and all of them exist."""
    for name in names:
        if not _expand(manager, [name]) or (not _is_pattern(name) and name not in manager.task_index):
            near = difflib.get_close_matches(name, library.names() | set(manager.all_tasks), n=5, cutoff=0.5)
            ask = f"Did you mean {', '.join(repr(other) for other in near)}? " if near else ""
            raise RecipeError(
                f"unknown task '{name}'. {ask}All are listed by `lm-eval ls tasks`; definitions of your own are read "
                "from --include-path FOLDER."
            )
    return _expand(manager, names)


def _use_local_data(manager: Any, names: Sequence[str], data: Path, scratch: Path) -> dict[str, str]:
    """Give the tasks that have a data set in ``data`` another definition in the index.

    Args:
        scratch: an empty folder for these definitions, which stays until the tasks are built.

    Returns:
        Those tasks, each with the split of its few-shot examples if that is not there, else with "".
    """
    import yaml
    from lm_eval.tasks import TaskManager

    index = manager.task_index
    tasks = list(dict.fromkeys(leaf for name in names for leaf in leaves(index, name) if leaf in index))
    files = {task: found for task in tasks if (found := _local_files(index[task].cfg or {}, data))}
    if not files:
        return {}
    missing = {}
    for number, (task, found) in enumerate(files.items()):
        splits = {use: split for use in _USES if (split := index[task].cfg.get(use))}
        examples = next(splits[use] for use in _USES if use in splits)
        missing[task] = "" if examples in found else str(examples)
        definition = {use: None for use, split in splits.items() if split not in found} | {
            "include": str(index[task].yaml_path),
            "task": task,
            "dataset_path": FILE_TYPES[next(iter(found.values())).suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in found.items()}},
        }
        (scratch / f"{number}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    replaced = TaskManager(include_defaults=False, include_path=scratch).task_index
    index.update({task: replaced[task] for task in files})
    return missing


def _places(definition: Mapping[str, Any]) -> list[str]:
    """Where a local data set may be, relative to the folder of all and without an ending."""
    path = str(definition.get("dataset_path") or "").rpartition("/")[2]
    name = definition.get("dataset_name")
    return [path] if name in (None, "default") else [str(name), f"{path}/{name}"]


def _asked_split(definition: Mapping[str, Any]) -> str:
    """The split whose documents a task asks about; where both are named lm-eval takes this one."""
    return str(definition.get("test_split") or definition.get("validation_split"))


def _wanted(definition: Mapping[str, Any]) -> str:
    """What a local data set would be called, in words."""
    place = _places(definition)[0]
    return f"{place}.jsonl, or {place}/{_asked_split(definition)}.jsonl beside the other splits"


def _example(index: Mapping[str, Any], names: Sequence[str]) -> str:
    """One of the tasks, and what a local data set for it would be called, in words."""
    known = (leaf for name in names for leaf in leaves(index, name) if leaf in index)
    task = next(known, None)
    if task is None:
        return f"task '{names[0]}'"
    return f"task '{task}'; it would be {_wanted(index[task].cfg or {})}"


def _local_files(definition: Mapping[str, Any], data: Path) -> dict[str, Path]:
    """Split -> file; empty if the data set is not there. A file beside no others is the split that is asked about."""
    if not definition.get("dataset_path"):
        return {}
    asked = _asked_split(definition)
    splits = dict.fromkeys([asked, *(str(split) for use in _USES if (split := definition.get(use)))])
    for place in _places(definition):
        for ending in FILE_TYPES:
            if (file := data / f"{place}{ending}").is_file():
                return {asked: file}
            found = {split: file for split in splits if (file := data / place / f"{split}{ending}").is_file()}
            if asked in found:
                return found
    return {}


def _build(manager: Any, name: str, local: Mapping[str, str]) -> list[Any]:
    """The task or group called ``name``, or the tasks of the tag, with their documents."""
    try:
        found = manager.load([name])
    except (OSError, ValueError) as error:  # what the datasets library raises, offline or not
        index = manager.task_index
        fetched = [leaf for leaf in leaves(index, name) if leaf in index and leaf not in local and index[leaf].cfg]
        if not fetched:
            raise
        leaf = next((leaf for leaf in fetched if str(index[leaf].cfg.get("dataset_path")) in str(error)), fetched[0])
        definition = index[leaf].cfg
        raise QuantkitError(
            f"the data set of task '{leaf}', {definition.get('dataset_path')}, is neither in the local cache nor can "
            f"it be fetched ({' '.join(str(error).split())}); without a network put it into a folder as "
            f"{_wanted(definition)}, and name that folder with --data."
        ) from error
    groups = list(found.get("groups", {}).values())
    return groups[:1] or list(found["tasks"].values())


def single_tasks(chosen: Iterable[Any]) -> list[Any]:
    """The ``Task`` objects in tasks and groups."""
    return [task for item in chosen for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]


def _check_usable(chosen: Sequence[Any]) -> None:
    seen: set[str] = set()
    for task in single_tasks(chosen):
        name = task.task_name
        if name in seen:
            raise RecipeError(f"task '{name}' was asked for twice, by itself or in a group; name it once.")
        seen.add(name)
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(f"task '{name}' runs code that the model writes; quantkit does not: use lm-eval itself.")
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"task '{name}' asks about images or sound; quantkit measures language models.")
