"""``quantkit eval``: what a model, quantised or not, does on real text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.loaded import DeviceOption, Dtype, DtypeOption, JsonOption, ModelArgument, TrustOption, load_model
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.eval.perplexity import Perplexity

EXAMPLES = """Examples:

quantkit eval demo --ppl demo

quantkit eval out --ppl wikitext2 --ppl novels=texts/novels-test.txt --seqlen 512 --max-tokens 65536

quantkit eval out --ppl news.parquet --column body --json
"""


def evaluate(
    model: ModelArgument,
    ppl: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="text for perplexity, repeatable: demo, wikitext2, c4, a .txt/.jsonl/.parquet file or a folder of "
            "them, or NAME=PATH to choose its name in the results",
        ),
    ],
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="tokens per window  [default: 2048, or all positions of the model]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="use only the first tokens of each text")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows per forward pass")] = 1,
    bos: Annotated[bool, typer.Option("--bos", help="begin every window with the BOS token")] = False,
    column: Annotated[str, typer.Option(help="field of .jsonl and .parquet files that holds the text")] = "text",
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the perplexity of MODEL with the protocol of the papers."""
    from quantkit.calibrate.text import load_text

    texts = [load_text(source, column=column) for source in ppl]  # before the model: a typing error shows at once
    names = [text.name for text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"--ppl has two texts called '{twice[0]}'; name them with --ppl NAME=PATH.")

    from quantkit.cli.console import Progress, print_json, table
    from quantkit.eval.perplexity import perplexity
    from quantkit.loading import check_writes_text

    loaded, tokenizer = load_model(model, dtype, device, trust_remote_code)
    check_writes_text(loaded, "perplexity")
    with Progress(quiet=as_json) as progress:
        results = {
            text.name: perplexity(
                loaded, tokenizer, text, seqlen=seqlen, max_tokens=max_tokens, batch_size=batch_size, bos=bos,
                on_progress=progress.update,
            )
            for text in texts
        }  # fmt: skip
    if as_json:
        print_json({"model": model, "perplexity": {name: _as_json(result) for name, result in results.items()}})
        return
    rows = [[name, f"{result.value:.4f}", str(result.tokens), str(result.seqlen)] for name, result in results.items()]
    table(["text", "perplexity", "tokens", "seqlen"], rows, right=("perplexity", "tokens", "seqlen"))
    for name, result in results.items():
        print(f"{name}: {result.protocol}")


def _as_json(result: Perplexity) -> dict[str, float | int | str | None]:
    """JSON has no infinity, which a thoroughly broken model reaches: it becomes null."""
    value = result.value if math.isfinite(result.value) else None
    return {
        "value": value,
        "tokens": result.tokens,
        "seqlen": result.seqlen,
        "windows": result.windows,
        "protocol": result.protocol,
    }
