"""What keeping the keys and values of one layer costs: bytes, time of a decoding step, time of taking in a prompt.

A layer is filled by itself, without a model around it: a prompt of 16 384 tokens would take a model hours on a CPU, and
neither bytes nor times depend on what the tokens say. Keys are normal numbers, each channel with a spread of its own
(log-normal) and some with a bias, as keys have, then rotated as the model rotates them; values are normal. They go in a
few hundred at a time, as they do while a model reads a prompt in pieces.

A step takes in one token and attends to all: with ``dense`` everything is read back and goes through the product that
the model's own attention would use, with ``packed`` it is read block by block. Full precision is transformers' own
layer, which copies all it holds for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.bench_decode import model_config
from quantkit.eval.harness import Candidate, Timing, compare
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import attentions as attentions_of
from quantkit.kv.attach import empty_cache, key_dim, value_dim
from quantkit.kv.attention_function import ATTENTIONS, DENSE, PACKED
from quantkit.kv.cache import Lent, QuantisedLayer
from quantkit.kv.interface import LayerKV
from quantkit.kv.memory import memory_report
from quantkit.kv.methods import NONE
from quantkit.kv.packed_attention import attend
from quantkit.kv.rope import Rope, rope_of

_PIECE = 512
"""Tokens that go in at a time."""
_SPREAD, _BIASED, _BIAS = 0.7, 6, 5.0
"""Of keys: log-normal spread of the channels; how many have a bias, and how much, in standard deviations."""


class Row(NamedTuple):
    """One way to keep keys and values, and to read them, at one context."""

    model: str
    kv: str
    attention: str
    context: int
    batch: int
    bytes: int
    """That one layer keeps alive, measured."""
    bits_per_element: float
    times_smaller: float
    """Than full precision in the same dtype."""
    decode: Timing | None
    """Of a step of all sequences in one layer, seconds; None: it was not timed."""
    decode_ratio: float | None
    """Seconds of full precision over those of this one."""
    encode: Timing | None
    """Of one token of every sequence in one layer, seconds, while a prompt is taken in."""


@dataclass(frozen=True)
class Shape:
    """A layer of a model whose queries see all tokens."""

    model: PreTrainedModel
    """Without weights."""
    layer: int
    batch: int
    query_heads: int
    heads: int
    """Of keys and values."""
    key_dim: int
    value_dim: int
    rope: Rope | None

    def layer_kv(self, name: str) -> LayerKV:
        """How the layer keeps keys and values by ``name``."""
        held = empty_cache(self.model, kv_of(name), DENSE).layers[self.layer]
        assert isinstance(held, QuantisedLayer)
        return held.kv


def parse_names(text: str) -> list[str]:
    """Names of caches, with commas between; each once.

    Raises:
        RecipeError: there is none of that name.
    """
    names = _parts(text)
    for name in names:
        kv_of(name)
    return [name for name in names if name != NONE]


def parse_contexts(text: str) -> list[int]:
    """Numbers of tokens, with commas between.

    Raises:
        RecipeError: it is not that.
    """
    parts = _parts(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"--context '{text}' cannot be read: write numbers of tokens, like 4096 or 1024,16384.")
    return [int(part) for part in parts]


def parse_attentions(text: str) -> list[str]:
    """packed, dense or both, with a comma between.

    Raises:
        RecipeError: it is something else.
    """
    parts = _parts(text)
    if not parts or not set(parts) <= set(ATTENTIONS):
        raise RecipeError(f"--attention '{text}' cannot be read: write {PACKED}, {DENSE} or {PACKED},{DENSE}.")
    return parts


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))


@torch.inference_mode()
def bench(
    model: str,
    names: Sequence[str],
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attentions: Sequence[str] = ATTENTIONS,
    batch: int = 1,
    rounds: int = 5,
    trust_remote_code: bool = False,
) -> list[Row]:
    """Full precision, then each of ``names`` read in each of the ways ``attentions``.

    Args:
        model: as for ``bench_decode.bench``; only its configuration is looked at.
        names: of caches.
        context: tokens that are held.
        rounds: timed calls of each, at least three are made; 0: bytes alone.

    Raises:
        RecipeError: no such cache.
        QuantkitError: no such model, or none of its layers is kept by such a cache.
    """
    shape = _shape(model, batch, trust_remote_code)
    kinds = {name: shape.layer_kv(name) for name in names}
    like = torch.empty(0, dtype=dtype, device=device)
    layers: dict[str, DynamicLayer | QuantisedLayer] = {NONE: DynamicLayer()}
    layers |= {name: QuantisedLayer(kv) for name, kv in kinds.items()}
    for layer in layers.values():
        fill(layer, shape, context, like)
    held = {name: memory_report(Cache(layers=[layer])) for name, layer in layers.items()}
    ways = [(name, attention) for name in layers for attention in (attentions if name != NONE else (DENSE,))]
    steps: dict[str, Candidate] = {
        f"{name} {attention}": partial(_step, layers[name], attention, *_next_token(shape, context, like))
        for name, attention in ways
    }
    decode = _timed(steps, device, rounds, 1)
    base = decode.get(f"{NONE} {DENSE}")
    piece = min(_PIECE, context)
    prompt = keys_and_values(shape, 0, piece, dtype, device)
    encode = _timed({name: partial(_encode, kinds.get(name), *prompt) for name in layers}, device, rounds, piece)
    return [
        Row(
            model, name, attention, context, batch, held[name].bytes, held[name].bits_per_element,
            held[NONE].bytes / held[name].bytes, step, base.median / step.median if base and step else None,
            encode.get(name),
        )
        for name, attention in ways
        for step in (decode.get(f"{name} {attention}"),)
    ]  # fmt: skip


def report(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For a JSON file."""
    timed = {"decode", "encode"}
    return [
        {name: value and value._asdict() if name in timed else value for name, value in row._asdict().items()}
        for row in rows
    ]


def keys_and_values(
    shape: Shape, first: int, last: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of tokens ``first`` to ``last - 1``, [batch, heads, last - first, head_dim] each; the same ones every time."""
    draw = torch.Generator(device).manual_seed(first)
    sides = torch.Generator(device).manual_seed(2**31 - 1)

    def normal(*sizes: int, draw: torch.Generator = draw) -> Tensor:
        return torch.randn(*sizes, generator=draw, device=device)

    spread = torch.exp(_SPREAD * normal(shape.heads, 1, shape.key_dim, draw=sides))
    bias = torch.zeros_like(spread)
    bias[..., :_BIASED] = _BIAS * normal(shape.heads, 1, min(_BIASED, shape.key_dim), draw=sides).sign()
    keys = (normal(shape.batch, shape.heads, last - first, shape.key_dim) + bias) * spread
    if shape.rope is not None:
        keys = shape.rope.rotate(keys, torch.arange(first, last, device=device))
    values = normal(shape.batch, shape.heads, last - first, shape.value_dim)
    return keys.to(dtype), values.to(dtype)


def fill(layer: DynamicLayer | QuantisedLayer, shape: Shape, context: int, like: Tensor) -> None:
    """Put ``context`` tokens into ``layer``, in the dtype and on the device of ``like``; nothing is read back."""
    held = []
    for first in range(0, context, _PIECE):
        keys, values = keys_and_values(shape, first, min(first + _PIECE, context), like.dtype, like.device)
        if isinstance(layer, QuantisedLayer):
            _take(layer, keys, values)
        else:
            held.append((keys, values))
    if isinstance(layer, DynamicLayer):
        layer.update(*(torch.cat(side, dim=2) for side in zip(*held, strict=True)))


def _timed(candidates: Mapping[str, Candidate], device: torch.device, rounds: int, parts: int) -> dict[str, Timing]:
    """Seconds of one of the ``parts`` of a call."""
    found = compare(candidates, device, rounds=rounds, warmup=1) if rounds else {}
    return {name: Timing(t.median / parts, t.p20 / parts, t.p80 / parts, t.rounds) for name, t in found.items()}


def _next_token(shape: Shape, context: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the next token."""
    key, value = keys_and_values(shape, context, context + 1, like.dtype, like.device)
    groups = shape.query_heads // shape.heads
    return key.repeat_interleave(groups, dim=1), key, value


class _Groups(nn.Module):
    """What transformers' attention function asks of an attention."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def _step(layer: Any, attention: str, query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
    scaling = key.shape[-1] ** -0.5
    if attention == DENSE:
        keys, values = layer.update(key, value)
        groups = _Groups(query.shape[1] // key.shape[1])
        return sdpa_attention_forward(groups, query, keys, values, None, scaling=scaling)[0]
    _take(layer, key, value)
    return attend(query, layer, None, scaling).transpose(1, 2)


def _take(layer: QuantisedLayer, keys: Tensor, values: Tensor) -> None:
    layer.lent = Lent(layer, whole=False)
    layer.update(keys, values)


def _encode(kv: LayerKV | None, keys: Tensor, values: Tensor, number: int) -> None:
    if kv is None:
        DynamicLayer().update(keys.clone(), values.clone())
    else:
        _take(QuantisedLayer(kv), keys, values)


def _shape(model: str, batch: int, trust_remote_code: bool) -> Shape:
    config, _ = model_config(model, trust_remote_code)
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    held = empty_cache(skeleton, None).layers
    found = next((one for one in attentions_of(skeleton) if type(held[one.layer]) is DynamicLayer), None)
    if found is None:
        name = type(skeleton).__name__
        raise QuantkitError(f"no layer of {name} has queries that see all tokens; choose another model.")
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        skeleton, found.layer, batch, text.num_attention_heads, heads, key_dim(found.module), value_dim(found.module),
        rope_of(config, found.layer),
    )  # fmt: skip
