"""How close a model is to the one that it was made from, token by token: what a perplexity alone does not show.

Both models run on the windows of ``quantkit.eval.perplexity``. With p the baseline's and q the model's distribution of
the next token,

    KL(p || q) = sum over the vocabulary of p * (log p - log q)          in nats, per predicted token

is 0 where they are the same and says how many nats of what the baseline knew are lost (a perplexity can stay the same
while right and wrong answers change places: Dutta et al., arXiv 2407.09141). Top-1 agreement is the share of tokens
where both rank the same one first. Softmax, KL and sums are in float64: in float32 the rounding of the terms would be
as large as the KL of 8-bit weights, about 1e-5.

Both models are in memory, with the logits of one batch of windows; a few rows of these are float64 at a time.

Models with different tokenizers have no tokens in common. What can be compared then is how many bits they need for a
byte of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.calibrate.text import Text
from quantkit.eval.generation import GenerationAgreement, generation_agreement
from quantkit.eval.paired import Ratio, perplexity_ratio
from quantkit.eval.perplexity import (
    Perplexity,
    WindowLosses,
    Windows,
    check_finite,
    protocol,
    token_windows,
    window_losses,
)
from quantkit.eval.streaming import streamed_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.pipeline import OnProgress

ROWS_PER_CHUNK = 64
"""Rows of logits that are float64 at a time: 64 rows of a 128k vocabulary are 67 MB, and half a dozen such are made."""

WORST = 3
"""Windows that are shown."""


@dataclass(frozen=True)
class WorstWindow:
    """A window on which the model is far from the baseline, and its token of largest KL."""

    number: int
    """Counted from 1."""
    kl: float
    """Mean over the window's predicted tokens, nats."""
    perplexity: float
    baseline_perplexity: float
    text: str
    """Before the token."""
    token: str
    token_kl: float
    model_says: str
    """The likeliest token at this place."""
    baseline_says: str


@dataclass(frozen=True)
class Divergence:
    """What only models with the same tokens can be asked."""

    kl: float
    """Mean of KL(baseline || model) over the predicted tokens, nats."""
    kl_99: float
    """99 % of the tokens have less."""
    kl_largest: float
    top1_agreement: float
    """Share of the predicted tokens, 0 .. 1."""
    perplexity_ratio: Ratio
    worst: tuple[WorstWindow, ...]
    generation: GenerationAgreement | None


@dataclass(frozen=True)
class Fidelity:
    """A model beside its baseline on one text."""

    perplexity: Perplexity
    baseline_perplexity: Perplexity
    bits_per_byte: float
    """Bits of -log2 p per byte (UTF-8) of the predicted text."""
    baseline_bits_per_byte: float
    divergence: Divergence | None
    why_not: str
    """Why there is no divergence; empty where there is one."""


@dataclass(frozen=True)
class _Compared:
    """One batch of windows of T tokens."""

    kl: Tensor
    """[B, T - 1] float64, on the CPU, as all here."""
    same_top: Tensor
    """[B, T - 1] bool."""
    top: Tensor
    """[2, B, T - 1] int64: the likeliest token, the model's and the baseline's."""
    loss: Tensor
    """[2, B] float64: sum of -log p of each window's tokens."""


def fidelity(
    model: PreTrainedModel,
    tokenizer: Any,
    baseline: PreTrainedModel,
    baseline_tokenizer: Any,
    text: Text,
    *,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    bos: bool = False,
    stream: bool = True,
    prompts: int = 0,
    on_progress: OnProgress | None = None,
) -> Fidelity:
    """Compare ``model`` with ``baseline`` on ``text``.

    Args:
        seqlen: as ``max_tokens`` and ``bos``, for ``quantkit.eval.perplexity.token_windows``.
        batch_size: windows per forward pass of each model.
        stream: as for ``window_losses``.
        prompts: beginnings of windows that both models continue greedily; 0: none.
        on_progress: called with (what, windows done, windows in all).

    Raises:
        RecipeError: a length that a model or the text cannot have.
        QuantkitError: fewer than two tokens of text, a foreign tokenizer, or logits that are not numbers.
    """
    cut: dict[str, Any] = {"seqlen": seqlen, "max_tokens": max_tokens, "bos": bos}
    how: dict[str, Any] = {"batch_size": batch_size, "stream": stream, "on_progress": on_progress}
    if why_not := other_tokens(model, tokenizer, baseline, baseline_tokenizer):
        sides = []
        for one, own in ((model, tokenizer), (baseline, baseline_tokenizer)):
            losses = window_losses(one, own, text, **cut, **how)
            windows = token_windows(one, own, text, **cut)
            sides.append((losses.perplexity(), _bits_per_byte(losses, windows, own, bos)))
        (perplexity, bits), (baseline_perplexity, baseline_bits) = sides
        return Fidelity(perplexity, baseline_perplexity, bits, baseline_bits, None, why_not)
    shorter = min((model, baseline), key=_positions)
    windows = token_windows(shorter, tokenizer, text, **cut)
    count, length = windows.tokens.shape
    parts = []
    for first in range(0, count, batch_size):
        batch = windows.tokens[first : first + batch_size]
        part = _compare(model, baseline, batch, stream)
        check_finite(part.loss[0], first, text)
        check_finite(part.loss[1], first, text, "the baseline's")
        parts.append(part)
        if on_progress:
            on_progress(f"comparison on {text.name}", first + len(batch), count)
    nll, baseline_nll = torch.cat([part.loss for part in parts], dim=1) / (length - 1)
    losses, baseline_losses = (
        WindowLosses(one, length, protocol(windows, whose, stream))
        for one, whose in ((nll, model), (baseline_nll, baseline))
    )
    kl = torch.cat([part.kl for part in parts])
    generation = None
    if prompts:
        generation = generation_agreement(model, baseline, windows.tokens, prompts=prompts, on_progress=on_progress)
    divergence = Divergence(
        kl=float(kl.mean()),
        kl_99=float(kl.flatten().kthvalue(math.ceil(0.99 * kl.numel())).values),
        kl_largest=float(kl.max()),
        top1_agreement=float(torch.cat([part.same_top for part in parts]).double().mean()),
        perplexity_ratio=perplexity_ratio(nll, baseline_nll),
        worst=_worst(kl, torch.cat([part.top for part in parts], dim=1), nll, baseline_nll, windows, tokenizer),
        generation=generation,
    )
    bits, baseline_bits = (_bits_per_byte(one, windows, tokenizer, bos) for one in (losses, baseline_losses))
    return Fidelity(losses.perplexity(), baseline_losses.perplexity(), bits, baseline_bits, divergence, "")


def other_tokens(model: PreTrainedModel, tokenizer: Any, baseline: PreTrainedModel, baseline_tokenizer: Any) -> str:
    """Why the models' distributions are over different things, in words; empty if they are over the same."""
    mine, its = tokenizer.get_vocab(), baseline_tokenizer.get_vocab()
    if mine != its:
        if len(mine) != len(its):
            return f"the model's tokenizer has {len(mine)} tokens and the baseline's has {len(its)}"
        token = min(token for token, number in mine.items() if its.get(token) != number)
        other = its.get(token, "none")
        return f"the tokenizers differ: {token!r} is token {mine[token]} of the model's and {other} of the baseline's"
    widths = [one.config.get_text_config().vocab_size for one in (model, baseline)]
    if widths[0] != widths[1]:
        return f"the model has {widths[0]} logits and the baseline has {widths[1]}"
    return ""


def _positions(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


@torch.inference_mode()
def _compare(model: PreTrainedModel, baseline: PreTrainedModel, batch: Tensor, stream: bool) -> _Compared:
    """batch [B, T] through both; everything about rows 1 .. T - 1 of the logits."""
    logits, baseline_logits = (_logits(one, batch, stream)[:, :-1] for one in (model, baseline))  # [B, T - 1, V] each
    device = logits.device
    count, predicted = logits.shape[:2]
    targets = batch[:, 1:].to(device)
    kl = torch.empty(count, predicted, dtype=torch.float64, device=device)
    loss = torch.empty(2, count, predicted, dtype=torch.float64, device=device)
    top = torch.empty(2, count, predicted, dtype=torch.int64, device=device)
    for window in range(count):
        for first in range(0, predicted, ROWS_PER_CHUNK):
            rows = slice(first, first + ROWS_PER_CHUNK)
            both = [one[window, rows].to(device) for one in (logits, baseline_logits)]
            log_q, log_p = (one.double().log_softmax(dim=-1) for one in both)  # [rows, V]
            kl[window, rows] = divergence(log_p, log_q)
            for side, (own, log) in enumerate(zip(both, (log_q, log_p), strict=True)):
                top[side, window, rows] = own.argmax(dim=-1)
                loss[side, window, rows] = -log.gather(1, targets[window, rows, None]).squeeze(1)
    return _Compared(kl.cpu(), (top[0] == top[1]).cpu(), top.cpu(), loss.sum(dim=-1).cpu())


def _logits(model: PreTrainedModel, batch: Tensor, stream: bool) -> Tensor:
    """[B, T, V] of batch [B, T]."""
    parts = list(streamed_logits(model, batch.to(model.device), stream))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every row, [rows], of float64 log-probabilities [rows, vocabulary].

    A token that p excludes (-inf) adds nothing. Rounding can leave a sum that is 0 a little below: it is 0 then.
    """
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp(min=0)


def _worst(
    kl: Tensor, top: Tensor, nll: Tensor, baseline_nll: Tensor, windows: Windows, tokenizer: Any
) -> tuple[WorstWindow, ...]:
    """The windows of largest mean KL; none that has no divergence at all.

    Args:
        kl: [windows, T - 1].
        top: [2, windows, T - 1] int64.
        nll: [windows], as ``baseline_nll``.
    """
    means = kl.mean(dim=1)
    found = []
    for number in means.argsort(descending=True, stable=True)[:WORST].tolist():
        if means[number] == 0:
            break
        place = int(kl[number].argmax())  # predicts the token behind it
        before, token = windows.tokens[number, : place + 1], windows.tokens[number, place + 1 : place + 2]
        found.append(
            WorstWindow(
                number=number + 1,
                kl=float(means[number]),
                perplexity=float(nll[number].exp()),
                baseline_perplexity=float(baseline_nll[number].exp()),
                text=_decoded(tokenizer, before),
                token=_decoded(tokenizer, token),
                token_kl=float(kl[number, place]),
                model_says=_decoded(tokenizer, top[0, number, place : place + 1]),
                baseline_says=_decoded(tokenizer, top[1, number, place : place + 1]),
            )
        )
    return tuple(found)


def _decoded(tokenizer: Any, tokens: Tensor | Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _bits_per_byte(losses: WindowLosses, windows: Windows, tokenizer: Any, bos: bool) -> float:
    """Bits for the predicted tokens over the bytes of text that they stand for.

    A window's first token is not predicted: its bytes are those of the window less those of that token. (A BOS token is
    no text; what a tokenizer drops in front of a window it drops in front of the token, too.)
    """
    count, length = windows.tokens.shape
    number = 0
    for window in windows.tokens.tolist():
        text, first = window[bos:], [] if bos else window[:1]
        number += len(_decoded(tokenizer, text).encode()) - len(_decoded(tokenizer, first).encode())
    nats = float(losses.nll.mean()) * count * (length - 1)
    return nats / math.log(2) / number if number else math.nan
