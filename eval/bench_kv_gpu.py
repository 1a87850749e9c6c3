"""Decoding steps over a cache that NSNQuant keeps, and what packing takes; for GPUs, part of ``bench_gpu``.

A layer of Llama-3-8B: 32 queries and 8 keys and values of 128 numbers. Attention over codes is measured against
PyTorch's own over keys and values in bfloat16, with the queries that share a head side by side, which it is fastest
with. Calls take caches in turns that are not in the GPU's cache, inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.eval.harness import Candidate, compare, copies_past_the_cache
from quantkit.kernels.triton import kv_attention
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.nsn_encode import Chunks, Coder
from quantkit.kv.nsn_store import NSNStore
from quantkit.kv.nsnquant import NSN, Config, layer_kv
from quantkit.kv.packed_attention import attend
from quantkit.kv.rope import Rope

CASES = ((1, 4096), (1, 32768), (32, 4096), (32, 32768))
"""Sequences, tokens of each."""
HEADS, SHARED, WIDTH = 8, 4, 128
PACKED_AT_ONCE = (1, 64)
"""Chunks: of a decoding step, of a prompt."""
TOLERANCE = 5e-3
_BITS: tuple[Literal[1, 2], ...] = (1, 2)
_DENSE = "bfloat16"
_ROUNDS, _CALLS, _SECONDS = 10, 20, 3.0
_DTYPE = torch.bfloat16


def attention(device: torch.device) -> Iterator[dict[str, Any]]:
    """Errors against all keys and values read back, then times."""
    yield from errors(device)
    for case in CASES:
        yield from decoding(device, *case)
    yield from packing(device)


def errors(device: torch.device, tokens: int = 1000) -> list[dict[str, Any]]:
    """Relative, Frobenius norm; with padding and without. ``kernel``: it was one that multiplies codes."""
    rows = []
    for bits in _BITS:
        layer, query = _layer(bits, _states(tokens, device), 2), _queries(2, device)
        keys, values = (store.read(0, tokens, torch.float32).repeat_interleave(SHARED, 1) for store in layer.stores)
        for padding in (0, tokens // 3):
            mask = torch.arange(tokens, device=device) >= torch.tensor([0, padding], device=device)[:, None, None, None]
            logits = (query.float() @ keys.mT * WIDTH**-0.5).masked_fill(~mask, -torch.inf)
            want = logits.softmax(-1) @ values
            found = attend(query, layer, mask if padding else None, WIDTH**-0.5)
            error = float((found.float() - want).norm() / want.norm())
            rows.append({"what": f"{bits} bit", "padding": padding, "kernel": _by_kernel(query, layer),
                         "error": error, "right": error < TOLERANCE})  # fmt: skip
    return rows


@torch.inference_mode()
def decoding(device: torch.device, batch: int, tokens: int) -> list[dict[str, Any]]:
    """One token of ``batch`` sequences that sees ``tokens`` each."""
    states, query = _states(tokens, device), _queries(batch, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    dense = copies_past_the_cache(2 * batch * states[0].nbytes, cache)
    sides = [tuple(side.repeat(batch, 1, 1, 1) for side in states) for _ in range(dense)]
    held = {}
    for bits in _BITS:
        layers = [_layer(bits, states, batch)]
        nbytes = sum(part.nbytes for part in layers[0].tensors())
        layers += [_layer(bits, states, batch) for _ in range(copies_past_the_cache(nbytes, cache) - 1)]
        held[f"{bits} bit"] = layers
    grouped = query.view(batch, HEADS, SHARED, WIDTH)
    candidates: dict[str, Candidate] = {
        _DENSE: lambda number: F.scaled_dot_product_attention(
            grouped, sides[number % dense][0], sides[number % dense][1]
        )
    }
    candidates |= {name: partial(_attended, query, layers) for name, layers in held.items()}
    calls = max(_CALLS, dense, *map(len, held.values()))
    timings = compare(candidates, device, rounds=_ROUNDS, most_seconds=_SECONDS, graph_calls=calls)
    return [
        {
            "what": name,
            "batch": batch,
            "tokens": tokens,
            "kernel": name != _DENSE and _by_kernel(query, held[name][0]),
            "seconds": timing.median,
            "against bfloat16": timings[_DENSE].median / timing.median,
        }
        for name, timing in timings.items()
    ]


@torch.inference_mode()
def packing(device: torch.device) -> list[dict[str, Any]]:
    """``Coder.encode`` of the keys and of the values of one layer and sequence."""
    rows = []
    for bits in _BITS:
        kv = _layer(bits, _states(1, device), 1).kv
        for side, method in (("keys", kv.keys), ("values", kv.values)):
            assert isinstance(method, NSN)
            coder = method.coder
            for count in PACKED_AT_ONCE:
                tokens = count * coder.window
                states = _states(tokens, device)[0].unflatten(2, (count, coder.window))
                starts = coder.window * torch.arange(count, device=device)
                run = partial(_packed, coder, states, starts)
                seconds = compare({"": run}, device, rounds=_ROUNDS, most_seconds=_SECONDS)[""].median
                rows.append({"what": f"pack {side}, {bits} bit", "tokens": tokens, "seconds": seconds,
                             "nanoseconds per token": 1e9 * seconds / tokens})  # fmt: skip
    return rows


def _attended(query: Tensor, layers: list[QuantisedLayer], number: int) -> Tensor:
    return attend(query, layers[number % len(layers)], None, WIDTH**-0.5)


def _packed(coder: Coder, states: Tensor, starts: Tensor, number: int) -> Chunks:
    return coder.encode(states, starts)


def _states(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, [1, HEADS, tokens, WIDTH]."""
    keys, values = torch.randn(2, 1, HEADS, tokens, WIDTH, dtype=_DTYPE, device=device)
    return keys, values


def _queries(batch: int, device: torch.device) -> Tensor:
    return torch.randn(batch, HEADS * SHARED, 1, WIDTH, dtype=_DTYPE, device=device)


def _layer(bits: Literal[1, 2], states: tuple[Tensor, Tensor], batch: int) -> QuantisedLayer:
    """Holds ``states`` in each of ``batch`` sequences."""
    rope = Rope(tuple(5e5 ** (-2 * pair / WIDTH) for pair in range(WIDTH // 2)))
    layer = QuantisedLayer(layer_kv(Config(bits=bits), WIDTH, WIDTH, rope))
    layer.update(*states)
    layer.batch_repeat_interleave(batch)
    return layer


def _by_kernel(query: Tensor, layer: QuantisedLayer) -> bool:
    keys, values = (store.view() for store in layer.stores if isinstance(store, NSNStore))
    return keys is not None and values is not None and kv_attention.refuses(query, keys, values) is None
