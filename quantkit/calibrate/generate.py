"""Calibration text that the model writes itself, as for norm tweaking (Li et al., arXiv 2309.02784).

A text begins with a random token in one of the writing systems that are allowed: a random token of a multilingual
vocabulary is mostly one that its model hardly knows. The next three to five tokens are the likeliest, the others are
sampled at temperature 1. Where a text ends, another one begins, which knows nothing of it.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY = 3, 5
"""Fewest and most tokens behind the first that are the likeliest ones."""

_MARKER = re.compile(r"[<\[].*[>\]]", re.DOTALL)
"""Spellings in a vocabulary that are no text: <unused7>, [unused7], <|reserved|>, and bytes as in <0x0A>."""
_REPEATS = re.compile(r"(.)\1\1", re.DOTALL)


def first_tokens(tokenizer: Any, vocab_size: int, scripts: Collection[str]) -> list[int]:
    """Tokens with which a text may begin, ascending.

    They have a letter or digit, and letters of ``scripts`` only (first words of Unicode character names: ``latin``,
    ``cyrillic``, ``cjk``); no special and unused tokens, no parts of characters, no character three times in a row.

    Raises:
        QuantkitError: none is of these scripts.
    """
    letters = tuple(f"{script.upper()} " for script in scripts)
    special = _special_ids(tokenizer)
    spelled = {
        token: spelling
        for spelling, token in tokenizer.get_vocab().items()
        if token < vocab_size and token not in special and not _MARKER.fullmatch(spelling)
    }
    candidates = sorted(spelled)
    texts = tokenizer.batch_decode([[token] for token in candidates])
    if not any(_may_begin(text, letters) for text in texts):
        raise QuantkitError(
            f"no token of the vocabulary is text in {', '.join(scripts)}, so the model cannot begin one; name other "
            "scripts (calibration.scripts), or calibrate on a text."
        )
    return [token for token, text in zip(candidates, texts, strict=True) if _may_begin(text, (*letters, "DIGIT "))]


def _may_begin(text: str, allowed: tuple[str, ...]) -> bool:
    letters = [character for character in text if character.isalnum()]
    return (
        bool(letters)
        and "\ufffd" not in text
        and not _REPEATS.search(text)
        and all(unicodedata.name(letter, "").startswith(allowed) for letter in letters)
    )


@torch.inference_mode()
def generate_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    batch_size: int = 8,
    scripts: Collection[str] = ("latin",),
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Tensor:
    """Let ``model`` write ``nsamples`` samples of exactly ``seqlen`` tokens; no more than it has positions.

    No special token is in them but the end-of-text tokens between two texts. First tokens are all different as long as
    there are enough. A sample depends on the seed and on its number, not on the batch that it is in.

    Args:
        model: in eval mode, on any device.
        tokenizer: the model's.
        batch_size: samples that are written at a time, each with its keys and values in memory.
        scripts: see ``first_tokens``.
        on_progress: called with (what, tokens done, tokens in all).

    Returns:
        [nsamples, seqlen] int64 on the CPU.

    Raises:
        QuantkitError: no token may begin a text, or the model's logits are not numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config().vocab_size
    ends = _end_ids(model, tokenizer, vocab_size)
    firsts = torch.tensor([token for token in first_tokens(tokenizer, vocab_size, scripts) if token not in ends])
    firsts = firsts[torch.randperm(len(firsts), generator=generator)]
    greedy = torch.randint(GREEDY[0], GREEDY[1] + 1, (nsamples, seqlen), generator=generator)
    chances = torch.rand(nsamples, seqlen, generator=generator, dtype=torch.float64)
    unknown = set(range(vocab_size)) - set(tokenizer.get_vocab().values())  # an embedding may have spare rows
    special = {token for token in _special_ids(tokenizer) if token < vocab_size}
    writer = _Writer(model, ends, (unknown | special) - ends)
    parts = []
    for numbers in torch.arange(nsamples).split(batch_size):
        first = firsts[(numbers[:, None] + nsamples * torch.arange(seqlen)) % len(firsts)]  # none twice, if possible
        parts.append(writer.write(first, greedy[numbers], chances[numbers]))
        if on_progress:
            on_progress("writing calibration text", (int(numbers[-1]) + 1) * seqlen, nsamples * seqlen)
    return torch.cat(parts)


class _Writer:
    """Writes a batch of samples token by token, with the model's cache of keys and values."""

    def __init__(self, model: PreTrainedModel, ends: Collection[int], banned: Collection[int]) -> None:
        """``ends`` are the tokens that end a text, ``banned`` those that are in none."""
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64)
        self._banned = torch.tensor(sorted(banned), dtype=torch.int64)

    def write(self, first: Tensor, greedy: Tensor, chances: Tensor) -> Tensor:
        """[batch, tokens] int64.

        Args:
            first: [batch, texts], with what the texts of a sample begin; there may be as many as tokens.
            greedy: [batch, tokens], how many of the likeliest tokens follow where a text begins at this place.
            chances: [batch, tokens] in [0, 1), which token is sampled at this place.
        """
        count, length = chances.shape
        ids = torch.zeros(count, length, dtype=torch.int64)
        seen = torch.zeros(count, length, dtype=torch.int64)  # attention mask: the tokens of the text being written
        begins = torch.ones(count, dtype=torch.bool)
        texts, place, calm = torch.zeros(3, count, dtype=torch.int64)  # texts begun, place in the text, greedy places
        cache: Any = None
        for step in range(length):
            token = first.gather(1, texts[:, None]).squeeze(1)
            if step:
                logits, cache = self._forward(ids[:, step - 1 : step], seen[:, :step], place[:, None], cache)
                chosen = self._choose(logits, place < calm, step == length - 1, chances[:, step])
                token = torch.where(begins, token, chosen)
            texts = texts + begins
            place = torch.where(begins, 0, place + 1)
            calm = torch.where(begins, greedy[:, step], calm)
            seen[begins, :step] = 0
            ids[:, step], seen[:, step] = token, 1
            begins = torch.isin(token, self._ends)
        return ids

    def _forward(self, ids: Tensor, seen: Tensor, place: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """float32 logits [batch, vocabulary] behind the tokens ``ids`` [batch, 1]."""
        device = self._model.device
        positions = {"position_ids": place.to(device)} if self._takes_positions else {}
        output = self._model(
            input_ids=ids.to(device), attention_mask=seen.to(device), past_key_values=cache, use_cache=True, **positions
        )
        return output.logits[:, -1].float().cpu(), output.past_key_values

    def _choose(self, logits: Tensor, likeliest: Tensor, last: bool, chance: Tensor) -> Tensor:
        """The next token of each sample: its likeliest, or the one that ``chance`` hits."""
        logits = logits.index_fill(1, self._banned, -torch.inf)
        endless = logits.index_fill(1, self._ends, -torch.inf)
        total = torch.softmax(endless if last else logits, dim=1).double().cumsum(dim=1)
        if not torch.isfinite(total[:, -1]).all():
            raise QuantkitError(
                "the model cannot write calibration text: its logits are NaN or Inf; its weights are broken or its "
                "dtype overflows; calibrate on a text."
            )
        # right: a token without probability is never hit, not even by a chance of 0
        sampled = torch.searchsorted(total, chance[:, None] * total[:, -1:], right=True).squeeze(1)
        return torch.where(likeliest, endless.argmax(dim=1), sampled)


def _special_ids(tokenizer: Any) -> set[int]:
    """Also those that are in no role (<|reserved_special_token_7|>)."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | set(tokenizer.all_special_ids)


def _end_ids(model: PreTrainedModel, tokenizer: Any, vocab_size: int) -> set[int]:
    """Tokens that end a text; a model may have several."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return {token for token in ends if token is not None and token < vocab_size}
