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
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.demo import corpus

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 2048
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 640
LAYERS = 5
HEAD_DIM = 64
QUERY_HEADS = 4
KEY_VALUE_HEADS = 2
MAX_POSITIONS = 512

EVALUATION_WINDOW = 256
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


def train_tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE of ``VOCAB_SIZE`` entries, learned from ``documents``; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapper: Any = PreTrainedTokenizerFast  # its constructor carries no types
    return wrapper(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, under the class name that older releases of transformers know as well."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` without special tokens, whatever its length."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def token_stream(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 tensor of token ids, each document between the bos and the eos token."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *encode(tokenizer, document), tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """The untrained float32 model; embeddings are tied, which at this size leaves more of the bytes to the layers."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


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


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor, limit: int | None = None) -> tuple[float, int]:
    """Perplexity over non-overlapping windows of 256 tokens, and the number of tokens predicted.

    The first token of a window has no context and is not scored; a last, shorter window is dropped. ``limit`` bounds
    the number of windows.
    """
    windows = ids[: len(ids) // EVALUATION_WINDOW * EVALUATION_WINDOW].view(-1, EVALUATION_WINDOW)[:limit]
    total = 0.0
    for chunk in torch.split(windows, 16):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"))
    count = windows[:, 1:].numel()
    return math.exp(total / count), count


def unigram_perplexity(stream: torch.Tensor, ids: torch.Tensor) -> float:
    """Perplexity, on the tokens that ``perplexity`` scores, of training frequencies with add-one smoothing."""
    counts = torch.bincount(stream, minlength=VOCAB_SIZE).double() + 1
    log_probability = (counts / counts.sum()).log()
    windows = ids[: len(ids) // EVALUATION_WINDOW * EVALUATION_WINDOW].view(-1, EVALUATION_WINDOW)
    return math.exp(-float(log_probability[windows[:, 1:]].mean()))


@torch.inference_mode()
def greedy_continuations(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """48 greedy tokens after 32 tokens of held-out text, for every eighth evaluation window."""
    windows = ids[: len(ids) // EVALUATION_WINDOW * EVALUATION_WINDOW].view(-1, EVALUATION_WINDOW)[::8]
    context = windows[:, :32]
    output = model.generate(
        input_ids=context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=None,
    )
    return [row.tolist() for row in output[:, context.shape[1] :]]


def is_loop(tokens: list[int]) -> bool:
    """Whether the last 24 tokens repeat with a period of at most 8."""
    end = tokens[-24:]
    return any(end[period:] == end[:-period] for period in range(1, 9))


def evaluate_saved(folder: Path, stream: torch.Tensor, heldout: str) -> dict[str, Any]:
    """Held-out figures of the bf16 model saved in ``folder``, run in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(encode(tokenizer, heldout))
    value, count = perplexity(model, ids)
    continuations = greedy_continuations(model, ids)
    return {
        "perplexity": round(value, 3),
        "unigram_perplexity": round(unigram_perplexity(stream, ids), 2),
        "bits_per_byte": round(math.log2(value) * len(ids) / len(heldout.encode()), 4),
        "scored_tokens": count,
        "window": EVALUATION_WINDOW,
        "greedy_loops": sum(map(is_loop, continuations)),
        "greedy_contexts": len(continuations),
    }


def save_weights(model: LlamaForCausalLM, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and the bf16 weights, each whole or not at all."""
    config = LlamaConfig.from_dict(
        {**model.config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    )
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))
    os.replace(partial, folder / "model.safetensors")


CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language:
- en
pipeline_tag: text-generation
library_name: transformers
---

# quantkit demo model

A Llama-architecture language model of {parameters:,} parameters ({megabytes:.1f} MB in bf16), trained on the text
of the Python standard library. It exists to be quantised: small enough to ship inside a package, trained enough that
damage to its weights shows in its held-out perplexity. It knows nothing but the look of Python documentation and code.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from quantkit.demo import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    output = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(output[0]))

| | |
|---|---|
| Layers, hidden, intermediate | {layers}, {hidden}, {intermediate} |
| Query heads / key-value heads, head size | {query_heads} / {kv_heads}, {head_dim} |
| Vocabulary | {vocab}, byte-level BPE learned from the training text only |
| Embeddings | tied: at this size that leaves more of the bytes to the layers |
| Positions | {positions} |

The tokenizer adds no special tokens by itself. In training each document stood between `{bos}` and `{eos}`.

## Data

The standard library of CPython {python}: {files} files, {documents:,} documents, {tokens_in_corpus:,} tokens. The
documents are the help topics of `pydoc_data`, the docstrings of each module set out as prose, and the module sources.
Tests, IDLE, the codec tables and vendored packages are left out. {heldout_files} further files, chosen by a hash of
their path, are held out of the training of both the model and its tokenizer; `heldout.txt` beside this folder holds
their openings (at most 12,000 characters of each), and `calibration.txt` holds excerpts of the training text.

The text of the standard library, and so those two files, is under the
[PSF License Agreement](https://docs.python.org/3/license.html),
copyright (c) 2001 onwards Python Software Foundation. All rights reserved. The weights are offered on the same terms.

## Training

{step:,} steps of {batch_size} windows of {window} tokens: {tokens_seen:,} tokens, {epochs:.1f} passes over the text.
AdamW (betas {beta1}, {beta2}; weight decay {weight_decay} on matrices; gradient norm clipped at {clip}), peak learning
rate {lr:g} after {warmup} warm-up steps, held, then a half-cosine fall to zero over the last {decay:.0%} of
{steps:,} steps; seed {seed}; {precision}. It took {minutes:.0f} minutes on a CPU,
with PyTorch {torch} and transformers {transformers}.

    {command}

repeats it. Another machine or another Python release gives slightly different weights and figures.

## Evaluation

On `heldout.txt`, in non-overlapping windows of {eval_window} tokens ({scored:,} tokens scored; the first of each
window is not), with the saved bf16 weights run in float32:

| | perplexity |
|---|---|
| this model | {ppl:.2f} |
| unigram model of the training tokens, add-one smoothing | {unigram:.1f} |

That is {bpb:.3f} bits per byte. `training.json` holds the same figures.

Greedy text is weak: of {contexts} continuations of held-out text (32 tokens of context, 48 tokens generated),
{loops} end in a loop of at most 8 tokens. From a prompt of one or two words it loops more often still. Judge a
quantised model by its perplexity, not by its greedy text.
"""


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
        "precision": "float32" if args.float32 else "bfloat16 autocast over float32 weights",
        "seconds": round(progress.seconds),
        "heldout_by_step": progress.heldout,
        "heldout": figures,
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    card = CARD.format(
        parameters=report["parameters"],
        megabytes=report["bytes"] / 1e6,
        layers=LAYERS,
        hidden=HIDDEN_SIZE,
        intermediate=INTERMEDIATE_SIZE,
        query_heads=QUERY_HEADS,
        kv_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        vocab=VOCAB_SIZE,
        positions=MAX_POSITIONS,
        bos=BOS,
        eos=EOS,
        python=report["python"],
        files=report["training_files"],
        documents=documents,
        tokens_in_corpus=len(stream),
        heldout_files=len(report["heldout_files"]),
        step=progress.step,
        batch_size=args.batch_size,
        window=args.window,
        tokens_seen=tokens_seen,
        epochs=tokens_seen / len(stream),
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        clip=CLIP_NORM,
        lr=args.learning_rate,
        warmup=WARMUP_STEPS,
        decay=DECAY_SHARE,
        steps=args.steps,
        seed=args.seed,
        command=command_line(args),
        precision=report["precision"],
        minutes=progress.seconds / 60,
        torch=report["torch"],
        transformers=report["transformers"],
        eval_window=EVALUATION_WINDOW,
        scored=figures["scored_tokens"],
        ppl=figures["perplexity"],
        unigram=figures["unigram_perplexity"],
        bpb=figures["bits_per_byte"],
        loops=figures["greedy_loops"],
        contexts=figures["greedy_contexts"],
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
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
