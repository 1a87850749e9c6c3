"""Where quantised copies of a model lose: the error of every block's output, with one line per method.

    python -m quantkit.eval.block_losses --model FOLDER --edit outliers --calibration FILE --text FILE \\
        --method "os-plus W4A4" --method "hadamard W4A4" --output eval/results/block_losses.json

    own        the block takes what enters it in the unquantised model: what this block does by itself
    carried    it takes what the quantised blocks before it leave: what is left of all errors at this depth

Both are the squared error over the mean of the channels' variances, as learned methods measure it
(``tuning/losses.py``), on windows that nothing was calibrated on. Both models are in memory. Models whose residual
stream a method rotates have no block outputs in common with the original and are refused.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.errors import QuantkitError
from quantkit.eval.environment import environment
from quantkit.eval.tables import markdown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

WINDOWS = 16


def main(
    model: Annotated[str, typer.Option(help="with its tokenizer")],
    calibration: Annotated[str, typer.Option(help="text for methods that look at one")],
    text: Annotated[str, typer.Option(help="text to measure on")],
    method: Annotated[list[str], typer.Option(help="METHOD SCHEME, repeatable")],
    edit: Annotated[list[str] | None, typer.Option(help="make it harder first: spread, outliers")] = None,
    seqlen: Annotated[int, typer.Option(help="tokens of a window")] = 256,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
) -> None:
    """Print the losses of every block, and their means over the blocks."""
    import quantkit
    from quantkit.calibrate.text import load_text
    from quantkit.eval.injectors import EDITS, inject
    from quantkit.eval.perplexity import token_windows

    with tempfile.TemporaryDirectory() as scratch:
        source = model
        if edit:
            source = str(inject(Path(model), Path(scratch) / "edited", [EDITS[name] for name in edit]))
        original, tokenizer = quantkit.load(source, dtype="float32")
        tokens = token_windows(original, tokenizer, load_text(text), seqlen=seqlen).tokens[:WINDOWS]
        rows: list[dict[str, Any]] = []
        for wanted in method:
            name, scheme = wanted.split()
            folder = f"{scratch}/{len(rows)}"
            settings = {"source": calibration, "nsamples": 64, "seqlen": 256}
            quantkit.quantize(source, output=folder, method=name, scheme=scheme, calibration=settings)
            quantised, _ = quantkit.load(folder, dtype="float32")
            rows.append({"method": wanted, **block_losses(original, quantised, tokens)})
            print(rows[-1], file=sys.stderr, flush=True)
    lines = [["method", "", *(f"block {n}" for n in range(len(rows[0]["own"]))), "mean"]]
    for row in rows:
        for kind in ("own", "carried"):
            losses = [*row[kind], statistics.geometric_mean(row[kind])]
            lines.append([row["method"], kind, *(f"{loss:.2g}" for loss in losses)])
    print(markdown(lines))
    if output:
        command = "python -m quantkit.eval.block_losses " + " ".join(sys.argv[1:])
        found = {"command": command, "environment": environment(), "rows": rows}
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def block_losses(original: PreTrainedModel, quantised: PreTrainedModel, tokens: Tensor) -> dict[str, list[float]]:
    """``own`` and ``carried`` losses of all blocks.

    Args:
        tokens: [windows, length].

    Raises:
        QuantkitError: the residual stream of ``quantised`` is another one: its embedding differs.
    """
    import torch

    from quantkit.models.skeleton import blocks_path

    before, after = (model.get_input_embeddings()(tokens[:1]) for model in (original, quantised))
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-3):
        raise QuantkitError("the quantised model's residual stream is rotated: its blocks cannot be compared.")
    with torch.inference_mode():
        blocks = [list(model.get_submodule(blocks_path(model)).children()) for model in (original, quantised)]
        seen = _run(original, blocks[0], tokens)
        carried = _run(quantised, blocks[1], tokens)
        own = [
            _loss(_first(block(*args, **kwargs)), target)
            for block, (args, kwargs, target) in zip(blocks[1], seen, strict=True)
        ]
        return {
            "own": own,
            "carried": [_loss(found, target) for (*_, found), (*_, target) in zip(carried, seen, strict=True)],
        }


Seen = tuple[tuple[Any, ...], dict[str, Any], "Tensor"]
"""Arguments of a block and its output."""


def _run(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor) -> list[Seen]:
    seen: list[Seen] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args, kwargs, _first(output).clone()))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _loss(found: Tensor, target: Tensor) -> float:
    """Without the first token of a window, as learned methods leave it out."""
    found, target = found[:, 1:].double(), target[:, 1:].double()
    return float((found - target).square().mean() / target.var(dim=1).mean())


if __name__ == "__main__":
    typer.run(main)
