"""How long two models write the same: greedy continuations of the same prompts, token by token.

Unlike a KL divergence, which looks at one step from the true text, this lets a difference have its consequences: the
first other token ends the agreement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.pipeline import OnProgress

PROMPT_TOKENS = 32
NEW_TOKENS = 64
PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class GenerationAgreement:
    """Over the prompts."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    """Written behind each."""
    matched: float
    """Mean number of them in front of the first that differs."""
    identical: int
    """Prompts with none that differs."""


def generation_agreement(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    windows: Tensor,
    *,
    prompts: int,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    on_progress: OnProgress | None = None,
) -> GenerationAgreement:
    """Let both models continue the beginnings of windows that lie evenly over the text.

    Both write all of ``new_tokens``, behind an end-of-text token too, so that every prompt counts alike; prompt and
    continuation are shorter where the windows are.

    Args:
        windows: [windows, seqlen] int64.
        prompts: so many, or one per window if these are fewer.
        on_progress: called with (what, prompts done, prompts in all).
    """
    length = windows.shape[1]
    prompt_tokens = max(1, min(prompt_tokens, length // 2))
    new_tokens = min(new_tokens, length - prompt_tokens)
    count = min(prompts, len(windows))
    beginnings = windows[torch.arange(count) * len(windows) // count, :prompt_tokens]
    matched: list[int] = []
    for group in beginnings.split(PROMPTS_AT_ONCE):
        mine, its = (greedy(one, group, new_tokens) for one in (model, baseline))  # [B, new_tokens] each
        matched += (mine == its).long().cumprod(dim=1).sum(dim=1).tolist()
        if on_progress:
            on_progress("continuations", len(matched), count)
    identical = sum(one == new_tokens for one in matched)
    return GenerationAgreement(count, prompt_tokens, new_tokens, sum(matched) / count, identical)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """The likeliest token, ``new_tokens`` times, [B, new_tokens] int64 on the CPU; the model keeps its kind of cache.

    Not ``generate``, whose settings (penalties, suppressed tokens) come with each checkpoint and may differ.

    Args:
        prompts: [B, tokens] int64.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    given = prompts.to(model.device)
    written = []
    for _ in range(new_tokens):
        logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
        given = logits.argmax(dim=-1, keepdim=True).to(model.device)
        written.append(given)
    return torch.cat(written, dim=1).cpu()
