"""What the demo model does on text that it was not trained on."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from quantkit.demo.untrained import VOCAB_SIZE, encode

EVALUATION_WINDOW = 256


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
