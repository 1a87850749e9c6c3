"""Train the demo model on the standard library: ``python -m quantkit.demo.train --output DIR``.

The folder ``DIR`` receives a complete model (configuration, bf16 weights, tokenizer, card, ``training.json``) at every
checkpoint, so it can be used while training goes on. ``heldout.txt`` and ``calibration.txt`` are written beside it.
The learning rate warms up, holds, and falls along a half cosine over the last part of the run; until that fall begins
a run may be stopped and resumed with another ``--steps`` and is the run that would have been started with it.
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from quantkit.demo import corpus
from quantkit.demo.card import write_card
from quantkit.demo.heldout import evaluate_saved
from quantkit.demo.untrained import build_model, save_tokenizer, save_weights, token_stream, train_tokenizer

WARMUP_STEPS = 100
DECAY_SHARE = 0.25
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
PROGRESS_EVERY = 50


@dataclass
class Progress:
    """What a checkpoint carries besides the weights: how far the run is and what it cost."""

    step: int = 0
    seconds: float = 0.0
    heldout: list[tuple[int, float]] = field(default_factory=list)


def batch_at(stream: torch.Tensor, step: int, batch_size: int, window: int, seed: int) -> torch.Tensor:
    """The windows of one step, shape (batch_size, window): a function of its arguments, so a resumed run repeats none.

    An epoch cuts the stream into consecutive windows from a random offset and visits them in random order.
    """
    windows = len(stream) // window - 1
    epoch, place = divmod(step, windows // batch_size)
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    offset = int(torch.randint(window, (1,), generator=generator))
    order = torch.randperm(windows, generator=generator)[place * batch_size : (place + 1) * batch_size]
    return stream[offset + order[:, None] * window + torch.arange(window)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, a constant part, then a half cosine to zero over the last ``DECAY_SHARE`` of the run."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    start = steps * (1 - DECAY_SHARE)
    if step < start:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats the run of ``args``, into a folder of its own."""
    words = ["python -m quantkit.demo.train --output demo/model", f"--steps {args.steps} --seed {args.seed}"]
    words += [f"--batch-size {args.batch_size} --window {args.window} --learning-rate {args.learning_rate:g}"]
    words += ["--float32"] * args.float32 + ["--compile"] * args.compile
    return " ".join(words)


def write_checkpoint(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    heldout: str,
    progress: Progress,
    args: argparse.Namespace,
    documents: int,
) -> dict[str, Any]:
    """Save the model into ``args.output``, measure what was saved, and write ``training.json`` and the card."""
    save_weights(model, args.output)
    figures = evaluate_saved(args.output, stream, heldout)
    if not progress.heldout or progress.heldout[-1][0] != progress.step:
        progress.heldout.append((progress.step, figures["perplexity"]))
    tokens_seen = progress.step * args.batch_size * args.window
    report: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": (args.output / "model.safetensors").stat().st_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "training_files": len(corpus.training_files()),
        "training_documents": documents,
        "training_tokens": len(stream),
        "heldout_files": corpus.heldout_files(),
        "seed": args.seed,
        "steps": args.steps,
        "step": progress.step,
        "batch_size": args.batch_size,
        "window": args.window,
        "tokens_seen": tokens_seen,
        "learning_rate": args.learning_rate,
        "warmup_steps": WARMUP_STEPS,
        "decay_share": DECAY_SHARE,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "clip_norm": CLIP_NORM,
        "precision": "float32" if args.float32 else "bfloat16 autocast over float32 weights",
        "seconds": round(progress.seconds),
        "heldout_by_step": progress.heldout,
        "heldout": figures,
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_card(args.output, report, command_line(args))
    return figures


def train(args: argparse.Namespace) -> None:
    """Run the training that ``args`` describes; raises ``FileNotFoundError`` if ``--resume`` finds no state."""
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    state_file: Path = args.state or args.output.with_name(args.output.name + ".state.pt")

    documents = list(corpus.training_documents())
    heldout = corpus.heldout_text()
    (args.output.parent / "heldout.txt").write_text(heldout, encoding="utf-8")
    (args.output.parent / "calibration.txt").write_text(corpus.calibration_text(), encoding="utf-8")
    save_tokenizer(train_tokenizer(documents), args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    stream = token_stream(tokenizer, documents)

    model = build_model(tokenizer)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=BETAS,
        fused=True,
    )
    progress = Progress()
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            logits = model(input_ids=batch, use_cache=False).logits
        return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    print(
        f"{len(documents)} documents, {len(stream)} tokens, "
        f"{sum(parameter.numel() for parameter in model.parameters())} parameters, from step {progress.step}",
        flush=True,
    )

    def checkpoint() -> None:
        figures = write_checkpoint(model, stream, heldout, progress, args, len(documents))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
        partial = state_file.with_name(state_file.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, state_file)
        print(f"checkpoint at step {progress.step}: held-out {figures}", flush=True)

    losses: list[float] = []
    last_print = last_save = last = time.perf_counter()
    while progress.step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, args.steps, args.learning_rate)
        loss = step_loss(batch_at(stream, progress.step, args.batch_size, args.window, args.seed))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.step += 1
        now = time.perf_counter()
        progress.seconds += now - last
        if progress.step % PROGRESS_EVERY == 0:
            rate = len(losses) / (now - last_print)
            print(
                f"step {progress.step}/{args.steps} loss {sum(losses) / len(losses):.4f} "
                f"{rate * args.batch_size * args.window:.0f} tokens/s "
                f"{(args.steps - progress.step) / rate / 60:.1f} min left",
                flush=True,
            )
            losses, last_print = [], now
        if now - last_save > args.checkpoint_minutes * 60 and progress.step < args.steps:
            checkpoint()
            last_save = time.perf_counter()
        last = time.perf_counter()
    checkpoint()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m quantkit.demo.train", description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="model folder; the two text files go beside it")
    parser.add_argument("--steps", type=int, default=4700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak value")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="compile the step with torch.compile")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--state", type=Path, help="optimizer state (default: DIR.state.pt beside the output)")
    parser.add_argument("--resume", action="store_true", help="go on from the state file")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
