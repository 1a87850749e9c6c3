"""How long a model with a quantised cache writes what it writes with one in full precision.

    python -m quantkit.eval.kv_generation demo=demo models/stories260K=data/novels-test.txt --root FOLDER \\
        --output eval/results/kv_generation.json

Both continue the beginnings of the same windows greedily (``generation.py``). Prompts are long, so that there is
something that a method has encoded: ``read_from_codes`` says how much of what the new tokens see.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.calibrate.text import load_text
from quantkit.errors import RecipeError
from quantkit.eval.environment import environment
from quantkit.eval.generation import generation_agreement
from quantkit.eval.perplexity import token_windows
from quantkit.eval.streaming import held_by
from quantkit.eval.tables import markdown
from quantkit.formats.kv import kv_of
from quantkit.formats.writer import write_atomic
from quantkit.kv.attach import key_dim, kv_hooks, set_kv
from quantkit.kv.interface import Store
from quantkit.loading import load

CACHES = ("int8", "kivi-2bit", "rotation-2bit", "nsnquant-2bit", "nsnquant-1bit")


def main(
    pairs: Annotated[list[str], typer.Argument(metavar="MODEL=TEXT ...", help="what writes, and what it continues")],
    output: Annotated[Path, typer.Option(help="JSON file for the figures")],
    root: Annotated[Path, typer.Option(help="folder that paths are relative to")] = Path(),
    kv: Annotated[list[str] | None, typer.Option(help="repeatable", show_default=",".join(CACHES))] = None,
    prompts: Annotated[int, typer.Option(help="passages of each text")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="of each")] = 256,
    new_tokens: Annotated[int, typer.Option(help="behind each")] = 128,
) -> None:
    """Print a table and write it to OUTPUT."""
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        name, _, source = pair.partition("=")
        model, tokenizer = load(_of(root, name), dtype="float32")
        baseline, _ = load(_of(root, name), dtype="float32")
        text = load_text(_of(root, source))
        length = max(2 * prompt_tokens, prompt_tokens + new_tokens)  # of a shorter one not all would be the prompt
        windows = token_windows(model, tokenizer, text, seqlen=length).tokens
        for cache in kv or CACHES:
            set_kv(model, kv_of(cache))
            found = generation_agreement(
                model, baseline, windows, prompts=prompts, prompt_tokens=prompt_tokens, new_tokens=new_tokens
            )
            stores, hook = held_by(model), next(iter(kv_hooks(model)))
            share = share_in_generation(stores, found.prompt_tokens, found.new_tokens)
            row = {"model": Path(name).name, "head_dim": key_dim(model.get_submodule(hook)), "text": text.name}
            rows.append(row | {"kv": cache, **asdict(found), "read_from_codes": round(share, 4)})
            print(rows[-1], file=sys.stderr, flush=True)
    print(markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    arguments = ["FOLDER" if one == str(root) else one for one in sys.argv[1:]]
    command = " ".join(["python -m quantkit.eval.kv_generation", *arguments])
    found_all = {"command": command, "environment": environment(), "rows": rows}
    write_atomic(output, (json.dumps(found_all, indent=1) + "\n").encode())


def share_in_generation(stores: Sequence[Store], prompt: int, new: int) -> float:
    """Of the tokens that each new one sees: those read from codes.

    Raises:
        RecipeError: there are no new ones, or nothing is quantised.
    """
    if new < 1 or not stores:
        raise RecipeError("nothing is generated, or from a cache in full precision; name a cache and new tokens.")
    lengths = range(prompt, prompt + new)  # the first new token comes from the prompt
    return sum(store.coded_after(n) for store in stores for n in lengths) / (len(stores) * sum(lengths))


def _of(root: Path, name: str) -> str:
    """A path below ``root``, or a name of its own."""
    return str(root / name) if (root / name).exists() else name


if __name__ == "__main__":
    typer.run(main)
