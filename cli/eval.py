"""``quantkit eval``: what a model, quantised or not, does on real text and on tasks, and how far it is from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.loaded import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    KVOption,
    KVStreamOption,
    ModelArgument,
    TrustOption,
    load_model,
)

EXAMPLES = """Examples:

quantkit eval demo --ppl demo

quantkit eval out --ppl wikitext2 --ppl novels=texts/novels-test.txt --seqlen 512 --max-tokens 65536

quantkit eval out --ppl news.parquet --column body --json

quantkit eval out --ppl wikitext2 --kv rotation-2bit

quantkit eval out --baseline meta-llama/Llama-3.2-1B --ppl wikitext2 --tasks arc_easy,hellaswag --limit 200

quantkit eval out --tasks lambada_openai --num-fewshot 0 --batch-size auto --output-path results/

quantkit eval out --tasks blimp --data texts/blimp

quantkit eval out --baseline meta-llama/Llama-3.2-1B --tasks blimp --limit 200 --data texts/blimp --report report.html
"""


def evaluate(
    model: ModelArgument,
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="text for perplexity, repeatable: demo, wikitext2, c4, a .txt/.jsonl/.parquet file or a folder of "
            "them, or NAME=PATH to choose its name in the results",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="tasks, groups and tags of lm-eval, separated by commas; patterns as arc_*"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="model to compare with, as it is stored, on the same texts and tasks; both are in memory",
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="tokens per window  [default: 2048, or all positions of the model]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="use only the first tokens of each text")] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="windows or requests per forward pass; auto: for tasks what fits the GPU, on a CPU 8, for texts 1",
        ),
    ] = "auto",
    bos: Annotated[bool, typer.Option("--bos", help="begin every window with the BOS token")] = False,
    column: Annotated[str, typer.Option(help="field of .jsonl and .parquet files that holds the text")] = "text",
    prompts: Annotated[
        int, typer.Option(min=0, help="with --baseline: passages of each text that both models continue greedily")
    ] = 8,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="examples in front of each question  [default: as the task has it]")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="documents per task, or below 1 the share of them")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="local data sets of tasks, for example blimp's adjunct_island.jsonl ..."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="more task definitions (YAML), as in lm-eval; or their data")
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="save the tasks' results there, as lm-eval does")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="write the results, and the run that made MODEL, as a page")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="save every document with the answers to it, too")
    ] = False,
    softmax_dtype: Annotated[
        Dtype, typer.Option(help="dtype of tasks' log-likelihoods; auto: as lm-eval, the logits'; float32: fewer ties")
    ] = Dtype.auto,
    kv: KVOption = None,
    kv_stream: KVStreamOption = True,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL: perplexity with the protocol of the papers, lm-eval's tasks, closeness to another model."""
    from quantkit.cli import eval_measure as steps

    names = steps.task_names(tasks or ())
    about_tasks: dict[str, object] = {"--data": data, "--include-path": include_path, "--output-path": output_path}
    about_tasks |= {"--num-fewshot": num_fewshot, "--limit": limit, "--log-samples": log_samples}
    steps.check_request(model, ppl or (), names, about_tasks)
    if report:
        from quantkit.cli.report import check_page

        check_page(report)
    windows, requests = steps.batch_sizes(batch_size)
    texts = steps.read_texts(ppl or (), column)  # before the models, as the tasks: a typing error shows at once
    questions = steps.read_tasks(names, include_path=include_path, data=data, output_path=output_path, quiet=as_json)

    from quantkit.cli.console import Progress, say
    from quantkit.cli.eval_output import Found, as_json_content, show
    from quantkit.eval.streaming import read_in_words
    from quantkit.loading import check_writes_text

    side = load_model(model, dtype, device, trust_remote_code, kv)
    other = load_model(baseline, dtype, device, trust_remote_code) if baseline else None
    for one in (side, other) if other else (side,):
        check_writes_text(one[0], "perplexity" if texts else "asking tasks")
    found = Found(model, baseline, kv_read=read_in_words(side[0], kv_stream))
    with Progress(quiet=as_json) as progress:
        steps.measure_texts(
            found, side, other, texts, prompts=prompts, seqlen=seqlen, max_tokens=max_tokens, batch_size=windows,
            bos=bos, stream=kv_stream, on_progress=progress.update,
        )  # fmt: skip
        steps.measure_tasks(
            found, side, other, questions, num_fewshot=num_fewshot, limit=limit, batch_size=requests,
            output_path=output_path, log_samples=log_samples,
            softmax_dtype=None if softmax_dtype is Dtype.auto else softmax_dtype.value, stream=kv_stream,
            on_progress=progress.update,
        )  # fmt: skip
    show(found, as_json=as_json)
    if report:
        from quantkit.cli.report import write_evaluation

        write_evaluation(report, model, as_json_content(found))
        say(f"the report is {report}")
