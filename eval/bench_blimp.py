"""BLiMP of a model and of quantised copies of it, and whether plain lm-eval gives these the same scores.

    python -m quantkit.eval.bench_blimp --model FOLDER --data FOLDER/blimp --output eval/results/blimp.json

All 67 sets of Warstadt et al. (arXiv 1912.00582), questions without examples, models in float32. A quantised copy is
measured as it is used: packed, through ``zero_shot``. Then its weights are dequantised into a model of plain
transformers, and lm-eval is asked by itself, with its own wrapper: ``equal`` says whether every score is the same to
the last digit. Weights only, because plain transformers has no quantised activations.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.eval.environment import environment
from quantkit.eval.tables import markdown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.eval.tasks import Tasks

COPIES = ("rtn W4A16G64", "gptq W3A16G64", "sinq W3A16G64", "awq+gptq W2A16G64")
BATCH_SIZE = 32


def main(
    model: Annotated[str, typer.Option(help="with its tokenizer")],
    data: Annotated[Path, typer.Option(help="folder with a JSON-lines file per set")],
    calibration: Annotated[str, typer.Option(help="text for methods that look at one")],
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
    limit: Annotated[int, typer.Option(help="pairs of every set")] = 200,
    copies: Annotated[list[str] | None, typer.Option("--copy", help="METHOD SCHEME", show_default="four")] = None,
) -> None:
    """Print accuracies, and write them."""
    import quantkit
    from quantkit.eval.tasks import load_tasks
    from quantkit.eval.zero_shot import zero_shot

    tasks = load_tasks(["blimp"], data=data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("as it came", *(copies or COPIES)):
            folder = model
            if name != "as it came":
                method, scheme = name.split()
                folder = f"{scratch}/{len(rows)}"
                settings = {"source": calibration, "nsamples": 64, "seqlen": 256}
                quantkit.quantize(model, output=folder, method=method, scheme=scheme, calibration=settings)
            packed, tokenizer = quantkit.load(folder, dtype="float32")
            own = zero_shot(packed, tokenizer, tasks, name=name, limit=limit, batch_size=BATCH_SIZE).results["results"]
            plain = plainly(dequantised(packed), tokenizer, tasks, limit)
            accuracies = {task: numbers["acc,none"] for task, numbers in own.items()}
            sets = [value for task, value in accuracies.items() if task.removeprefix("blimp_") in _sets(data)]
            differing = sorted(task for task, numbers in own.items() if numbers != plain[task])
            rows.append(
                {
                    "model": name,
                    "sets": len(sets),
                    "pairs": limit * len(sets),
                    "accuracy": round(statistics.fmean(sets), 6),
                    "equal": not differing,
                    "differing": differing,
                    "by_set": {task: round(value, 6) for task, value in accuracies.items()},
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "by_set"}, file=sys.stderr, flush=True)
    shown = ("model", "sets", "pairs", "accuracy", "equal")
    print(markdown([list(shown), *([str(row[key]) for key in shown] for row in rows)]))
    if output:
        about = {
            "command": "python -m quantkit.eval.bench_blimp " + " ".join(sys.argv[1:]),
            "environment": environment(),
        }
        output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def dequantised(packed: PreTrainedModel) -> PreTrainedModel:
    """A model of plain transformers with the weights that ``packed`` stands for."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantkit.layers.quant_linear import QuantLinear

    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, QuantLinear)}
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            owner, _, kind = name.rpartition(".")
            if owner in layers and kind == "weight":
                tensor.copy_(layers[owner].dequantize())
            else:
                tensor.copy_(packed.get_parameter(name) if name in _parameters(packed) else packed.get_buffer(name))
    return plain


def plainly(model: PreTrainedModel, tokenizer: Any, tasks: Tasks, limit: int) -> dict[str, Any]:
    """lm-eval by itself: its wrapper, its function."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from quantkit.eval.tasks import quiet_lm_eval

    with quiet_lm_eval():
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH_SIZE)
        found = simple_evaluate(model=wrapped, tasks=list(tasks.chosen), task_manager=tasks.manager, limit=limit)
    results: dict[str, Any] = found["results"]
    return results


def _parameters(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _sets(data: Path) -> set[str]:
    return {path.stem for path in data.glob("*.jsonl")}


if __name__ == "__main__":
    typer.run(main)
