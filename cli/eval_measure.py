"""The steps of ``quantkit eval``: what is asked for is read before a model is, and measured one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.calibrate.text import Text
    from quantkit.cli.eval_output import Found
    from quantkit.eval.tasks import Tasks
    from quantkit.pipeline import OnProgress

Side = tuple[Any, Any]
"""A model and its tokenizer."""


def task_names(tasks: Sequence[str]) -> list[str]:
    """``--tasks a,b --tasks c`` -> a, b, c."""
    return [name.strip() for given in tasks for name in given.split(",") if name.strip()]


def check_request(model: str, ppl: Sequence[str], names: Sequence[str], about_tasks: dict[str, object]) -> None:
    """Is there something to do, and nothing that would be ignored?

    Args:
        about_tasks: options that only tasks have, and their values; None or False: not given.

    Raises:
        RecipeError: neither texts nor tasks, or options about tasks without any.
    """
    if not ppl and not names:
        raise RecipeError(
            f"nothing to measure {model} on: give --ppl TEXT (demo, wikitext2, a file), --tasks NAMES or both."
        )
    given = [option for option, value in about_tasks.items() if value is not None and value is not False]
    if given and not names:
        raise RecipeError(f"{given[0]} is about tasks, of which there are none: add --tasks NAMES or leave it away.")


def batch_sizes(given: str) -> tuple[int, int | str]:
    """(windows, requests) per forward pass of ``--batch-size``.

    Raises:
        RecipeError: neither a number nor ``auto``.
    """
    if given == "auto":
        return 1, "auto"
    if not given.isdecimal() or int(given) < 1:
        raise RecipeError(f"--batch-size {given} is neither a number from 1 on nor auto.")
    return int(given), int(given)


def read_texts(ppl: Sequence[str], column: str) -> list[Text]:
    """Raises:
    RecipeError: no such text, or two of one name.
    """
    from quantkit.calibrate.text import load_text

    texts = [load_text(source, column=column) for source in ppl]
    names = [text.name for text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"--ppl has two texts called '{twice[0]}'; name them with --ppl NAME=PATH.")
    return texts


def read_tasks(
    names: Sequence[str], *, include_path: Path | None, data: Path | None, output_path: Path | None, quiet: bool
) -> Tasks | None:
    """The tasks with their documents; None: there are no names.

    Raises:
        RecipeError: as ``load_tasks``, or results cannot be saved in ``output_path``.
        QuantkitError: as ``load_tasks``.
    """
    if not names:
        return None
    from quantkit.cli.console import quiet_libraries, say
    from quantkit.eval.tasks import load_tasks
    from quantkit.eval.zero_shot import check_output_path

    quiet_libraries()
    if output_path:
        check_output_path(output_path)
    if not quiet:
        say("reading the tasks and their data sets")
    return load_tasks(names, include_path=include_path, data=data)


def measure_texts(
    found: Found, side: Side, other: Side | None, texts: Sequence[Text], *, prompts: int, stream: bool,
    on_progress: OnProgress, **settings: Any,
) -> None:  # fmt: skip
    """Perplexity of ``side``, or with another model everything of ``quantkit.eval.fidelity``.

    Args:
        stream: as ``settings``, of ``quantkit.eval.perplexity.window_losses``.
    """
    from quantkit.eval.fidelity import fidelity
    from quantkit.eval.kv_memory import filled_cache, how_read
    from quantkit.eval.perplexity import perplexity

    settings |= {"stream": stream, "on_progress": on_progress}
    for text in texts:
        if other:
            compared = fidelity(*side, *other, text, prompts=prompts, **settings)
            found.fidelity[text.name], found.perplexity[text.name] = compared, compared.perplexity
        else:
            found.perplexity[text.name] = perplexity(*side, text, **settings)
    if texts:
        found.cache = filled_cache(side[0], max(one.seqlen for one in found.perplexity.values()))
        found.how_read = {} if found.cache is None else how_read(side[0], found.cache, stream)


def measure_tasks(found: Found, side: Side, other: Side | None, tasks: Tasks | None, **settings: Any) -> None:
    """Scores of ``side``, and of the other model.

    Args:
        settings: of ``quantkit.eval.zero_shot.zero_shot``.
    """
    if tasks is None:
        return
    from quantkit.eval.zero_shot import zero_shot

    found.tasks = zero_shot(*side, tasks, name=found.model, **settings)
    if other and found.baseline is not None:
        found.baseline_tasks = zero_shot(*other, tasks, name=found.baseline, **settings)
