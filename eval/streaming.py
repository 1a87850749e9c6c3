"""A text as a model that generates it would read it: each token sees the cache as it is at that moment.

In one pass over a window, a method that encodes several tokens together has encoded all it can before any of them is
read. A token then sees its own chunk as codes, which later tokens had a part in, and others as codes that would still
be as they came. While text is generated, n tokens are held as codes of ``Store.coded_after(n)`` of them and the others
as they came, and the last of the n reads just these.

So a window goes through a cache in calls. One that begins behind a tokens and ends behind b may hold them all if no
token of it sees other codes than it would by itself: coded_after is the same for a + 1 .. b, or every token is encoded
as it comes, in which case the mask keeps the later ones away. A method that encodes token by token takes one call, one
that packs chunks of 64 a call for each, KIVI, whose values leave the newest ones singly, as many as there are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import DynamicCache

from quantkit.kv.attach import kv_hooks
from quantkit.kv.interface import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def held_by(model: PreTrainedModel) -> list[Store]:
    """Empty stores of every attention of ``model`` that keeps keys and values quantised."""
    hooks = kv_hooks(model)
    kept = [hook.trial or hook.layer_kv(model.get_submodule(path)) for path, hook in hooks.items()]
    return [method.store() for kv in kept for method in (kv.keys, kv.values)]


def call_ends(stores: Sequence[Store], tokens: int) -> list[int]:
    """Lengths at which a call has to end, ascending; the last is ``tokens``, a whole window."""
    ends = {tokens}
    for store in stores:
        coded = [store.coded_after(n) for n in range(tokens + 1)]
        at_once = [held == n for n, held in enumerate(coded)]
        ends |= {n for n in range(1, tokens) if coded[n] != coded[n + 1] and not (at_once[n] and at_once[n + 1])}
    return sorted(ends)


def share_of_codes(stores: Sequence[Store], tokens: int) -> float:
    """Of all pairs of a token and one that it sees, itself included, in a window: those read from codes.

    Args:
        stores: of the layers that are quantised.
    """
    if not stores:
        return 0.0
    read = sum(store.coded_after(n) for store in stores for n in range(1, tokens + 1))
    return read / (len(stores) * tokens * (tokens + 1) / 2)


def read_in_words(model: PreTrainedModel, stream: bool) -> str:
    """How a measurement reads the keys and values of ``model``; empty: these are in full precision."""
    if not kv_hooks(model):
        return ""
    when = "when each token comes" if stream else "at the end of a window, which is read in one pass"
    return f"keys and values are read as they are held {when}"


def one_call(model: PreTrainedModel, tokens: int) -> bool:
    """Is a window of ``tokens`` read in one pass as it is when its tokens come one by one?"""
    return len(call_ends(held_by(model), tokens)) == 1


def streamed_logits(model: PreTrainedModel, tokens: Tensor, stream: bool = True) -> Iterator[Tensor]:
    """Logits [B, some, vocabulary] of the windows ``tokens`` [B, T], one call after the other; in all T of them.

    Args:
        stream: False: one call, which reads what is held at the end of it.
    """
    ends = call_ends(held_by(model), tokens.shape[1]) if stream else []
    if len(ends) < 2:  # nothing to hold on to
        yield model(input_ids=tokens, use_cache=False).logits
        return
    cache = DynamicCache(config=model.config)
    for first, last in zip([0, *ends], ends, strict=False):
        yield model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True).logits
