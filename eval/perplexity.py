"""Perplexity as the quantisation papers measure it (the code of GPTQ, Frantar et al., arXiv 2210.17323).

The whole text is one token stream without special tokens, cut into non-overlapping windows of ``seqlen`` tokens; what
is left over at the end is dropped. Every window is run by itself and predicts its tokens 2 .. seqlen, so

    perplexity = exp(sum of -log p(token | tokens before it in its window) / (windows * (seqlen - 1)))

which is the papers' mean over the windows' mean losses, because all windows are equally long. The sum is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quantkit.calibrate.text import Text
from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.streaming import read_in_words, streamed_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.pipeline import OnProgress

DEFAULT_SEQLEN = 2048
"""The papers' window; shorter where the model has fewer positions."""

TOKENS_PER_CHUNK = 256
"""Rows of logits that are held in float32 at a time: 256 rows of a 128k vocabulary are 134 MB."""


@dataclass(frozen=True)
class Perplexity:
    """One measured number and what it was measured on."""

    value: float
    tokens: int
    """Predicted tokens, the denominator of the mean."""
    windows: int
    seqlen: int
    protocol: str
    """How it was measured, in one sentence."""


@dataclass(frozen=True)
class Windows:
    """A text as a model is run on it."""

    tokens: Tensor
    """[windows, seqlen] int64, on the CPU."""
    protocol: str
    """How they were cut, in one sentence."""


@dataclass(frozen=True)
class WindowLosses:
    """What a perplexity is made of: windows of the same text can be compared one by one between models."""

    nll: Tensor
    """[windows] float64: mean of -log p over the predicted tokens of each."""
    seqlen: int
    protocol: str

    def perplexity(self) -> Perplexity:
        windows = len(self.nll)
        value = float(self.nll.mean().exp())
        return Perplexity(value, windows * (self.seqlen - 1), windows, self.seqlen, self.protocol)


def perplexity(model: PreTrainedModel, tokenizer: Any, text: Text, **settings: Any) -> Perplexity:
    """Perplexity of ``model`` on ``text``; arguments and errors are those of ``window_losses``."""
    return window_losses(model, tokenizer, text, **settings).perplexity()


def window_losses(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Text,
    *,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    bos: bool = False,
    stream: bool = True,
    on_progress: OnProgress | None = None,
) -> WindowLosses:
    """Mean loss of ``model`` on every window of ``text``.

    Args:
        seqlen: as the next two, for ``token_windows``.
        batch_size: windows per forward pass; changes speed and memory, not the number.
        stream: read quantised keys and values as they are held when each token comes (``streaming.py``); False: in
            one pass, as they are held at the end of a window.
        on_progress: called with (what, windows done, windows in all).

    Raises:
        RecipeError: a length that the model or the text cannot have.
        QuantkitError: fewer than two tokens of text, a foreign tokenizer, or logits that are not numbers.
    """
    windows = token_windows(model, tokenizer, text, seqlen=seqlen, max_tokens=max_tokens, bos=bos)
    count, length = windows.tokens.shape
    losses = []
    for first in range(0, count, batch_size):
        batch = windows.tokens[first : first + batch_size]
        losses.append(_summed_losses(model, batch, stream))
        check_finite(losses[-1], first, text)
        if on_progress:
            on_progress(f"perplexity of {text.name}", first + len(batch), count)
    return WindowLosses(torch.cat(losses) / (length - 1), length, protocol(windows, model, stream))


def token_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Text,
    *,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    bos: bool = False,
) -> Windows:
    """Cut ``text`` into the windows that ``model`` is measured on.

    Args:
        seqlen: tokens per window; default: 2048, or as many as the model has positions.
        max_tokens: use only that many tokens from the start of the stream.
        bos: begin every window with the tokenizer's BOS token, which takes the place of one text token.

    Raises:
        RecipeError: a length that the model or the text cannot have.
        QuantkitError: fewer than two tokens of text, or a foreign tokenizer.
    """
    seqlen = _window_length(model, seqlen)
    stream = tokenizer(text.joined, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    if max_tokens is not None:
        stream = stream[:max_tokens]
    tokens = _cut(stream, seqlen, _bos_id(tokenizer) if bos else None, text)
    vocabulary = model.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary:
        raise QuantkitError(
            f"the tokenizer gives token {int(tokens.max())} but the model embeds only {vocabulary}: they do not "
            "belong together; put the model's own tokenizer files into its folder."
        )
    count, length = tokens.shape
    return Windows(tokens, _protocol(count, length, seqlen, len(stream), bos))


def protocol(windows: Windows, model: PreTrainedModel, stream: bool) -> str:
    """How ``windows`` were cut and what ``model`` reads of them, in one sentence; ``stream`` as for
    ``window_losses``."""
    return "; ".join(part for part in (windows.protocol, read_in_words(model, stream)) if part)


def check_finite(losses: Tensor, first: int, text: Text, whose: str = "the model's") -> None:
    """A perplexity of logits that are no numbers is none.

    Args:
        losses: [B], of the windows from number ``first`` (of 0 ..) on.

    Raises:
        QuantkitError: one of them is NaN or infinite.
    """
    if not losses.isfinite().all():
        raise QuantkitError(
            f"{whose} logits on windows {first + 1} to {first + len(losses)} of {text.name} are not finite: its "
            "weights are broken, or its dtype overflows; try --dtype float32."
        )


def _window_length(model: PreTrainedModel, seqlen: int | None) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, positions or DEFAULT_SEQLEN)
    if seqlen < 2:
        raise RecipeError(f"--seqlen {seqlen} leaves no token to predict; use 2 or more.")
    if positions and seqlen > positions:
        raise RecipeError(
            f"--seqlen {seqlen} is more than the {positions} positions that the model has; use {positions}."
        )
    return seqlen


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise RecipeError("--bos was given but the model's tokenizer has no BOS token; leave --bos away.")
    return int(tokenizer.bos_token_id)


def _cut(stream: Tensor, seqlen: int, bos_id: int | None, text: Text) -> Tensor:
    """stream [tokens] -> [windows, seqlen] int64; [1, fewer] where the text does not fill one window."""
    room = seqlen if bos_id is None else seqlen - 1
    if len(stream) + (bos_id is not None) < 2:
        raise QuantkitError(
            f"text '{text.name}' has {len(stream)} tokens; perplexity needs at least 2, better thousands."
        )
    count = max(1, len(stream) // room)
    if text.max_windows is not None:
        count = min(count, text.max_windows)
    windows = stream[: count * room].reshape(count, -1)
    if bos_id is not None:
        windows = torch.cat([windows.new_full((count, 1), bos_id), windows], dim=1)
    return windows


@torch.inference_mode()
def _summed_losses(model: PreTrainedModel, batch: Tensor, stream: bool) -> Tensor:
    """[B] float64: sum of -log p over the predicted tokens of each window of batch [B, T].

    Only a few rows of logits are float32 at a time.
    """
    tokens = batch.to(model.device)
    total, first = torch.zeros(len(batch), dtype=torch.float64, device=model.device), 1
    for logits in streamed_logits(model, tokens, stream):  # [B, some of the T, V]
        targets = tokens[:, first : first + logits.shape[1]].to(logits.device)
        total = total.to(logits.device)
        for number, (window, wanted) in enumerate(zip(logits[:, : targets.shape[1]], targets, strict=True)):
            for rows, after in zip(window.split(TOKENS_PER_CHUNK), wanted.split(TOKENS_PER_CHUNK), strict=True):
                total[number] += cross_entropy(rows.float(), after, reduction="none").double().sum()
        first += logits.shape[1]
    return total.cpu()  # once: every look at a GPU's result waits for it


def _protocol(windows: int, length: int, seqlen: int, stream: int, bos: bool) -> str:
    start = "every window begins with BOS" if bos else "no special tokens"
    parts = "1 window" if windows == 1 else f"{windows} non-overlapping windows"
    cut = f"one token stream, {start}, {parts} of {length} tokens, each predicting {length - 1}"
    if length < seqlen:
        return f"{cut}; the text is shorter than one window of {seqlen}, so it is one short window"
    left_over = stream - windows * (length - bos)
    return f"{cut}; {left_over} tokens at the end left out" if left_over else cut
