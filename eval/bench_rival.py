"""Codebooks learned from a text against the fixed ones of ``nsnquant``: at home, and on other text.

    python -m quantkit.eval.bench_rival models/bench-llama models/bench-opt --root FOLDER \\
        --fit data/novels-calibration.txt --fit data/wikitext2-test.txt \\
        --text data/novels-test.txt --text data/wikitext2-test.txt --output eval/results/kv_rival.json

``coupled.py`` has the rival. It learns from the last tokens of a ``--fit`` text and is measured on the first ones of
each ``--text``, so both may be the same file. Every token is read from codes, its own included, in windows as those of
``eval/sweeps/kv.yaml``, where the other methods are. What is in the output is not measured again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from quantkit.calibrate.text import Text, load_text
from quantkit.errors import RecipeError
from quantkit.eval.coupled import Coupled, Kind, Watched, fit, use_coupled, watch
from quantkit.eval.environment import environment
from quantkit.eval.perplexity import window_losses
from quantkit.formats.writer import write_atomic
from quantkit.kv.attach import set_kv
from quantkit.kv.interface import LayerKV
from quantkit.loading import load

KINDS = ("4c8b", "8c8b")


def main(
    models: Annotated[list[str], typer.Argument(help="folders of models")],
    fit_texts: Annotated[list[str], typer.Option("--fit", help="text to learn from; repeatable")],
    texts: Annotated[list[str], typer.Option("--text", help="text to measure on; repeatable")],
    output: Annotated[Path, typer.Option(help="JSON file for the figures")],
    root: Annotated[Path, typer.Option(help="folder that paths are relative to")] = Path(),
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="repeatable", show_default=",".join(KINDS))] = None,
    nsamples: Annotated[int, typer.Option(help="windows to learn from")] = 32,
    seqlen: Annotated[int, typer.Option(help="tokens of a window")] = 512,
    max_tokens: Annotated[int, typer.Option(help="tokens to measure on")] = 16384,
    fisher: Annotated[bool, typer.Option(help="weigh tokens with their Fisher information")] = True,
    iterations: Annotated[int, typer.Option(help="of k-means")] = 8,
    seed: Annotated[int, typer.Option(help="of k-means")] = 0,
) -> None:
    """Add what is missing in OUTPUT."""
    rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.exists() else []
    done = {(row["model"], row["fit"], row["kind"]) for row in rows}
    learned_from, measured_on = (load_texts(root, names) for names in (fit_texts, texts))
    for name in models:
        model, tokenizer = load(str(root / name), dtype="float32")
        for text in learned_from:
            windows = last_windows(tokenizer, text, nsamples, seqlen, max_tokens if text in measured_on else 0)
            seen: Watched = {}
            for kind in kinds or KINDS:
                row = {
                    "model": Path(name).name,
                    "fit": text.name,
                    "kind": kind,
                    "bits": Kind.parse(kind).bits_per_element,
                }
                if (row["model"], row["fit"], kind) in done:
                    continue
                set_kv(model, None)
                seen = seen or watch(model, windows, fisher)
                started = time.process_time()
                kept = fit(model, seen, Kind.parse(kind), iterations=iterations, seed=seed)
                row |= {"fisher": fisher, "fitted_on_tokens": windows.numel(), "seed": seed, "iterations": iterations}
                row |= {"fit_cpu_seconds": round(time.process_time() - started, 1), "codebook_bytes": _bytes(kept)}
                use_coupled(model, kept)
                for other in measured_on:
                    losses = window_losses(
                        model, tokenizer, other, seqlen=seqlen, max_tokens=max_tokens, batch_size=8, stream=False
                    )
                    nll = [round(value, 5) for value in losses.nll.tolist()]
                    rows.append(row | {"text": other.name, "perplexity": losses.perplexity().value, "nll": nll})
                    print(*list(rows[-1].values())[:-1], file=sys.stderr, flush=True)
                _write(output, root, rows)


def load_texts(root: Path, names: Sequence[str]) -> list[Text]:
    """The files of these names in ``root``, or data sets."""
    return [load_text(str(root / name) if (root / name).exists() else name) for name in names]


def last_windows(tokenizer: Any, text: Text, nsamples: int, seqlen: int, measured: int) -> Tensor:
    """The last windows of ``text``, int64 [nsamples, seqlen].

    Args:
        measured: tokens at its beginning that they must not be of.

    Raises:
        RecipeError: it is too short.
    """
    stream = tokenizer(text.joined, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    wanted = nsamples * seqlen
    if len(stream) < wanted + measured:
        beside = f" besides the {measured} that are measured" if measured else ""
        raise RecipeError(f"text '{text.name}' has {len(stream)} tokens; to learn from it takes {wanted}{beside}.")
    windows: Tensor = stream[-wanted:].view(nsamples, seqlen)
    return windows


def _bytes(kept: Mapping[int, LayerKV]) -> int:
    """Of all codebooks."""
    methods = [method for kv in kept.values() for method in (kv.keys, kv.values)]
    return sum(method.books.nbytes for method in methods if isinstance(method, Coupled))


def _write(output: Path, root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    arguments = ["FOLDER" if one == str(root) else one for one in sys.argv[1:]]
    command = " ".join(["python -m quantkit.eval.bench_rival", *arguments])
    found = {"command": command, "environment": environment(), "rows": rows}
    write_atomic(output, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
