"""Coupled quantisation (Zhang et al., KV Cache is 1 Bit Per Channel, arXiv 2405.03917): what calibration would bring.

A rival to measure ``nsnquant`` against, not a method that is offered. c neighbouring channels of one head share a code
of b bits, ``4c8b`` in the paper's manner, so an element takes b / c bits and nothing else is kept for a token. Every
group of channels of every head and layer has 2**b codewords of its own, of keys in front of the rotary embedding, found
by k-means on calibration text. There a token counts with its Fisher information, the sum over the group of the squared
gradients of the model's loss:

    min over C of  sum over tokens of  |dL/dx|**2  min over k of  |x - C_k|**2        x [c], C [2**b, c]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from quantkit.errors import RecipeError
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import attentions, kv_hooks, set_kv
from quantkit.kv.interface import LayerKV
from quantkit.kv.quantiser import TokenStore, straight, wide
from quantkit.kv.rope import Rope, rope_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEYS, _VALUES = range(2)
_ROWS = 1024
"""Vectors of a group that are compared with all codewords at a time: 1 MB, which a CPU has at hand."""


@dataclass(frozen=True)
class Kind:
    """What the codes are of."""

    channels: int
    bits: int
    """Of a code, at most 8."""

    @classmethod
    def parse(cls, name: str) -> Kind:
        """Of ``4c8b``: four channels share eight bits.

        Raises:
            RecipeError: it is not such a name.
        """
        found = re.fullmatch(r"([1-9]\d*)c([1-8])b", name.strip().lower())
        if not found:
            raise RecipeError(f"'{name}' is no coupling; write channels and bits, up to 8, like 4c8b.")
        return cls(*map(int, found.groups()))

    @property
    def bits_per_element(self) -> float:
        return self.bits / self.channels


@dataclass(frozen=True, eq=False)
class Coupled:
    """A ``Method`` and a ``TokenCodec``."""

    books: Tensor
    """float16 [heads, groups, 2**b, c]"""
    rope: Rope | None
    """Undone before, and done again behind; None: there is none, as for values."""

    def store(self) -> CoupledStore:
        return CoupledStore(self)

    def round(self, states: Tensor) -> Tensor:
        """Gradients go straight through."""
        return straight(states, lambda x: self.store().append(x.detach()))

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """``codes`` uint8 [batch, heads, tokens, groups]."""
        heads, groups, _, channels = self.books.shape
        grouped = states.to(wide(states.dtype)).unflatten(-1, (groups, channels)).permute(1, 3, 0, 2, 4)
        rows = grouped.reshape(heads * groups, -1, channels)  # [heads * groups, batch * tokens, c]
        codes = nearest(rows, self.books.flatten(0, 1).to(rows.dtype))
        return {"codes": codes.view(grouped.shape[:-1]).permute(2, 0, 3, 1).to(torch.uint8).contiguous()}

    def decode(self, parts: dict[str, Tensor], head_dim: int, dtype: torch.dtype) -> Tensor:
        codes = parts["codes"].long()
        heads, groups = (torch.arange(size) for size in self.books.shape[:2])
        return self.books[heads[:, None, None], groups, codes].flatten(-2).to(dtype)


class CoupledStore(TokenStore):
    """Codes of vectors in front of the rotary embedding."""

    def __init__(self, codec: Coupled) -> None:
        super().__init__(codec, lambda: [codec.books])
        self._rope = codec.rope
        self._dropped = 0
        """Tokens in front of the first that is held."""

    def put(self, states: Tensor) -> None:
        super().put(self._turned(states, self.length, back=True))

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self._turned(super().read(first, last, dtype), first, back=False)

    def keep(self, first: int, last: int) -> None:
        super().keep(first, last)
        self._dropped += first

    def _turned(self, states: Tensor, first: int, back: bool) -> Tensor:
        if self._rope is None:
            return states
        slots = self._dropped + first + torch.arange(states.shape[2], device=states.device)
        turn = self._rope.unrotate if back else self._rope.rotate
        return turn(states.to(wide(states.dtype)), slots).to(states.dtype)


def use_coupled(model: PreTrainedModel, kept: Mapping[int, LayerKV]) -> None:
    """From now on ``model`` keeps keys and values as ``kept`` says; ``set_kv`` ends that.

    Args:
        kept: number of a layer -> how, as ``fit`` returns it.
    """
    set_kv(model, kv_of("int8"), "dense")  # its hooks, in whose place ``kept`` comes
    hooks = kv_hooks(model)
    for one in attentions(model):
        hooks[one.path].trial = kept[one.layer]


Watched = Mapping[tuple[int, int], tuple[Tensor, Tensor]]
"""(layer, keys or values) -> these and the gradients with respect to them, both [windows, heads, seqlen, head_dim]
float32."""


def fit(model: PreTrainedModel, seen: Watched, kind: Kind, *, iterations: int = 8, seed: int = 0) -> dict[int, LayerKV]:
    """Codebooks for every layer of ``model``.

    Args:
        seen: what ``watch`` saw.

    Raises:
        RecipeError: a head cannot be cut into groups of so many channels.
    """
    made = {}
    for (layer, side), (states, gradients) in seen.items():
        rope = rope_of(model, layer) if side == _KEYS else None
        if rope is not None:  # which turns gradients as it turns what they are of
            slots = torch.arange(states.shape[2])
            states, gradients = rope.unrotate(states, slots), rope.unrotate(gradients, slots)
        samples, weights = _grouped(states, kind), _grouped(gradients.square(), kind).sum(-1)
        books = k_means(samples, weights / weights.mean(), 2**kind.bits, iterations, f"{seed} {layer} {side}")
        made[layer, side] = Coupled(books.unflatten(0, (states.shape[1], -1)).half(), rope)
    return {layer: LayerKV(made[layer, _KEYS], made[layer, _VALUES]) for layer in sorted({layer for layer, _ in made})}


def k_means(samples: Tensor, weights: Tensor, codes: int, iterations: int, seed: str) -> Tensor:
    """Codewords [G, codes, c] for each of G sets of vectors ``samples`` [G, N, c] with ``weights`` [G, N], float32.

    Lloyd's iterations, begun by k-means++ (Arthur and Vassilvitskii, 2007): each codeword is a sample, drawn with its
    weight times its squared distance from those that are there. One without samples stays where it is.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode(), "big") % 2**63)
    which = torch.arange(len(samples))
    chance, books = weights.double(), []
    distance, lengths = torch.full_like(weights, torch.inf), samples.square().sum(-1, keepdim=True)
    for _ in range(codes):
        summed = chance.cumsum(dim=1)
        point = torch.rand(len(samples), 1, generator=generator, dtype=torch.float64) * summed[:, -1:]
        drawn = torch.searchsorted(summed, point, right=True).squeeze(1).clamp(max=samples.shape[1] - 1)
        books.append(samples[which, drawn])
        apart = torch.baddbmm(lengths, samples, books[-1][..., None], alpha=-2).squeeze(-1)
        distance = torch.minimum(distance, (apart + books[-1].square().sum(-1, keepdim=True)).clamp(min=0))
        chance = (weights * distance).double()
    found = torch.stack(books, dim=1)
    weighted = torch.cat([samples * weights[..., None], weights[..., None]], dim=-1)
    for _ in range(iterations):
        index = nearest(samples, found)[..., None].expand_as(weighted)
        sums = weighted.new_zeros(len(samples), codes, weighted.shape[-1]).scatter_add_(1, index, weighted)
        total = sums[..., -1:]
        found = torch.where(total > 0, sums[..., :-1] / total.clamp(min=torch.finfo(total.dtype).tiny), found)
    return found


def nearest(vectors: Tensor, books: Tensor) -> Tensor:
    """int64 [G, N]: the codeword of ``books`` [G, codes, c] that is nearest to each of ``vectors`` [G, N, c]."""
    found = []
    for own, half, all_of_it in zip(books.mT.contiguous(), books.square().sum(-1) / 2, vectors, strict=True):
        parts = [torch.addmm(half, part, own, alpha=-1).argmin(-1) for part in all_of_it.split(_ROWS)]
        found.append(torch.cat(parts))
    return torch.stack(found)


def _grouped(states: Tensor, kind: Kind) -> Tensor:
    """[batch, heads, tokens, head_dim] -> [heads * groups, batch * tokens, c]

    Raises:
        RecipeError: it cannot be cut so.
    """
    if states.shape[-1] % kind.channels:
        raise RecipeError(f"heads of {states.shape[-1]} channels cannot be cut into groups of {kind.channels}.")
    grouped = states.unflatten(-1, (-1, kind.channels)).permute(1, 3, 0, 2, 4)
    return grouped.flatten(2, 3).flatten(0, 1).contiguous()


def watch(model: PreTrainedModel, windows: Tensor, fisher: bool = True) -> Watched:
    """Keys and values of ``model``, which keeps all in full precision, on ``windows`` [windows, seqlen] int64.

    Args:
        fisher: take gradients of the loss; False: ones in their place, so that all tokens count alike.
    """
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for window in windows.to(model.device).split(1):
        cache = _Watching(model.config)
        with torch.set_grad_enabled(fisher):
            logits = model(input_ids=window, past_key_values=cache, use_cache=True).logits
            if fisher:
                cross_entropy(logits[0, :-1].float(), window[0, 1:].to(logits.device), reduction="sum").backward()
        for place, (states, leaf) in cache.seen.items():
            gradient = torch.ones_like(leaf) if leaf.grad is None else leaf.grad
            parts.setdefault(place, []).append((states.detach().float().cpu(), gradient.float().cpu()))
    model.zero_grad()
    return {place: (torch.cat([x for x, _ in of]), torch.cat([g for _, g in of])) for place, of in parts.items()}


class _Watching(DynamicCache):
    """Sees what it is given, and lets gradients with respect to that be taken."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """(layer, keys or values) -> these, and a tensor of zeros that was added to them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        leaves = [torch.zeros_like(x, requires_grad=torch.is_grad_enabled()) for x in (key_states, value_states)]
        self.seen[layer_idx, _KEYS], self.seen[layer_idx, _VALUES] = (key_states, leaves[0]), (value_states, leaves[1])
        return key_states + leaves[0], value_states + leaves[1]
