"""Attention that reads a cache block by block: against reading all of it back and writing the formula out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit.kv import packed_attention
from quantkit.kv.cache import Lent, QuantisedLayer
from quantkit.kv.interface import LayerFacts, LayerKV
from quantkit.kv.kivi import Config as KiviConfig
from quantkit.kv.kivi import layer_kv as kivi
from quantkit.kv.nsn_attention import NSNKeys, NSNValues
from quantkit.kv.nsn_encode import matrix
from quantkit.kv.nsn_store import NSNStore
from quantkit.kv.nsnquant import Config, layer_kv
from quantkit.kv.packed_attention import attend
from quantkit.kv.quantiser import MinMax
from quantkit.kv.rope import Rope
from quantkit.kv.rotation import RandomHadamard
from quantkit.kv.rotation_scalar import Config as RotationConfig
from quantkit.kv.rotation_scalar import layer_kv as rotation

HEADS, WIDTH, WINDOW, SINK = 2, 32, 16, 3


def rope(share: float = 1.0, interleaved: bool = False) -> Rope:
    dim = int(WIDTH * share)
    return Rope(tuple(1e4 ** (-2 * j / dim) for j in range(dim // 2)), interleaved)


def nsn(turned: Rope | None, **settings: Any) -> LayerKV:
    return layer_kv(Config(window=WINDOW, sink=SINK, **{"min_recent": 0} | settings), WIDTH, WIDTH, turned)


KINDS: dict[str, LayerKV] = {
    "nsn 2 bits": nsn(rope()),
    "nsn 1 bit": nsn(rope(), bits=1),
    "nsn paper": nsn(rope(0.5), preset="paper", bits=1, min_recent=8),
    "nsn interleaved": nsn(rope(0.5, interleaved=True)),
    "nsn no rope": nsn(None),
    "nsn no shift": nsn(rope(), key_shift="none"),
    "kivi": kivi(KiviConfig(group_size=8, residual=16), LayerFacts(0, WIDTH, WIDTH)),
    "rotation": rotation(RotationConfig(), LayerFacts(0, WIDTH, WIDTH)),
    "rotated keys": LayerKV(MinMax(4), MinMax(4), RandomHadamard("0")),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(kind: str | LayerKV, tokens: int, batch: int = 2) -> QuantisedLayer:
    """Keys with channels that are biased; what is kept is read by nobody."""
    layer = QuantisedLayer(KINDS[kind] if isinstance(kind, str) else kind)
    keys = normal(batch, HEADS, tokens, WIDTH, seed=1) + 2 * normal(WIDTH, seed=2)
    layer.update(keys, normal(batch, HEADS, tokens, WIDTH, seed=3))
    return layer


def written_out(
    query: Tensor, layer: QuantisedLayer, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """In float64, of all that is read back."""
    keys, values = (side.double().repeat_interleave(query.shape[1] // HEADS, dim=1) for side in layer.read())
    logits = query.double() @ keys.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1) @ values


def check(query: Tensor, layer: QuantisedLayer, mask: Tensor | None = None, softcap: float | None = None) -> None:
    found = attend(query, layer, mask, WIDTH**-0.5, softcap)
    expected = written_out(query, layer, mask, WIDTH**-0.5, softcap).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Two chunks at a time, of two sequences."""
    monkeypatch.setattr(packed_attention, "_BLOCK", 2 * WINDOW * 2 * HEADS * WIDTH)


@pytest.mark.parametrize("tokens", [1, SINK, SINK + 5, SINK + WINDOW, SINK + 2 * WINDOW + 1, 101])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attention_over_what_is_read_back(kind, tokens):
    """Nothing packed, a sink or a tail alone, whole chunks, several blocks."""
    layer = filled(kind, tokens)
    for shared, queries in ((1, 1), (4, 1), (7, 1), (2, 3)):
        check(normal(2, HEADS * shared, queries, WIDTH, seed=4), layer)


@pytest.mark.parametrize("kind", KINDS)
def test_caps_and_masks(kind):
    layer, query = filled(kind, 101), 3 * normal(2, HEADS * 4, 3, WIDTH, seed=4)
    check(query, layer, softcap=2.0)
    padding = torch.ones(2, 1, 1, 101, dtype=torch.bool)
    padding[0, ..., :40] = False  # the sink and whole chunks of one sequence
    check(query, layer, padding)
    causal = torch.ones(1, 1, 3, 101, dtype=torch.bool).tril(98)
    check(query, layer, causal, softcap=2.0)
    holes = normal(2, 1, 3, 101, seed=5) > 0.3
    check(query, layer, holes)
    by_head = normal(2, 8, 3, 101, seed=6)
    check(query, layer, by_head)
    check(query, layer, torch.where(by_head > 0, 0.0, torch.finfo(torch.float32).min))


def test_a_hadamard_matrix_that_is_not_symmetric():
    width = 24
    hadamard = matrix(width, torch.float32, torch.device("cpu"))
    assert not torch.equal(hadamard, hadamard.mT)
    layer = QuantisedLayer(layer_kv(Config(window=WINDOW, min_recent=0), width, width, None))
    layer.update(normal(2, HEADS, 70, width, seed=1), normal(2, HEADS, 70, width, seed=3))
    query = normal(2, HEADS * 2, 1, width, seed=4)
    expected = written_out(query, layer, None, 0.5).float()
    torch.testing.assert_close(attend(query, layer, None, 0.5), expected, rtol=1e-5, atol=1e-5)


def test_who_sees_nothing_gets_zero():
    mask = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    mask[1] = False
    found = attend(normal(2, HEADS, 1, WIDTH), filled("nsn 2 bits", 60), mask, 1.0)
    assert found[1].eq(0).all()
    assert found[0].ne(0).any()


def test_logits_that_differ_a_lot_do_not_overflow():
    layer, query = filled("nsn 2 bits", 101), 300 * normal(2, HEADS, 1, WIDTH, seed=4)
    check(query, layer)


@pytest.mark.parametrize("kind", ["nsn 1 bit", "nsn paper"])
def test_sums_of_tabled_products_are_the_products(kind):
    layer, query = filled(kind, 3 * 256 + 40), normal(2, HEADS * 3, 1, WIDTH, seed=4)
    check(query, layer)
    store = layer.stores[0]
    assert isinstance(store, NSNStore)
    view = store.view()
    assert view is not None
    rows = query.unflatten(1, (HEADS, 3)).flatten(2, 3)
    assert NSNKeys(view, rows)._table is not None
    assert NSNKeys(view, rows.repeat(1, 1, 2, 1))._table is None  # too few tokens for so many
    assert NSNKeys(view, rows.double())._table.dtype == torch.float64


def test_any_span_of_tokens_can_be_asked_for():
    layer = filled("nsn 2 bits", 101)
    views = [store.view() for store in layer.stores if isinstance(store, NSNStore)]
    query, weights = normal(2, HEADS, 4, WIDTH), normal(2, HEADS, 4, 101).double()
    keys, values = layer.read()
    products, reader = NSNKeys(views[0], query.double()), NSNValues(views[1], torch.float64)
    for first, last in ((0, 2), (1, 4), (5, 7), (10, 60), (70, 101), (99, 101), (0, 101)):
        torch.testing.assert_close(
            products.logits(first, last), query.double() @ keys[:, :, first:last].double().mT, rtol=1e-5, atol=1e-5
        )
        found = reader.output(reader.sums(weights[..., first:last], first, last))
        torch.testing.assert_close(
            found, weights[..., first:last] @ values[:, :, first:last].double(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_stores_read_spans_and_put_without_reading(kind):
    whole, layer = filled(kind, 90), QuantisedLayer(KINDS[kind])
    given = normal(2, HEADS, 90, WIDTH, seed=1) + 2 * normal(WIDTH, seed=2), normal(2, HEADS, 90, WIDTH, seed=3)
    for first, last in ((0, 2), (2, 50), (50, 51), (51, 90)):
        layer.lent = Lent(layer, whole=False)
        keys, values = layer.update(*(side[:, :, first:last] for side in given))
        assert torch.equal(keys, given[0][:, :, first:last])
        assert torch.equal(values, given[1][:, :, first:last])
        assert Lent.on(keys) is not None
        assert layer.lent is None
    for store, other in zip(layer.stores, whole.stores, strict=True):
        everything = other.read(0, 90, torch.float32)
        assert torch.equal(store.read(0, 90, torch.float32), everything)
        for first, last in ((0, 1), (2, 3), (4, 40), (33, 71), (60, 90), (89, 90)):
            read = store.read(first, last, torch.float32)
            torch.testing.assert_close(read, everything[:, :, first:last], rtol=1e-6, atol=1e-6)
        start, unit = store.grain
        assert (start, unit) in ((SINK, WINDOW), (0, WINDOW), (0, 8), (0, 1))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor of floats has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.numbers = max(self.numbers, leaf.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_all_keys_is_made(kind):
    """Neither to take in a token nor for attention: there are blocks, and floats beside the codes."""
    layer = filled(kind, 1027, batch=1)
    with torch.no_grad(), Largest() as largest:
        layer.lent = Lent(layer, whole=False)
        layer.update(normal(1, HEADS, 1, WIDTH), normal(1, HEADS, 1, WIDTH))
        attend(normal(1, HEADS, 1, WIDTH), layer, None, 1.0)
    assert largest.numbers <= HEADS * 1028 * WIDTH // 8
    with torch.no_grad(), Largest() as largest:
        layer.update(normal(1, HEADS, 1, WIDTH), normal(1, HEADS, 1, WIDTH))
    assert largest.numbers >= HEADS * 1029 * WIDTH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_the_sums_are_wider(dtype):
    layer = QuantisedLayer(KINDS["nsn 2 bits"])
    layer.update(normal(2, HEADS, 101, WIDTH, seed=1).to(dtype), normal(2, HEADS, 101, WIDTH, seed=3).to(dtype))
    query = normal(2, HEADS, 1, WIDTH, seed=4).to(dtype)
    found = attend(query, layer, None, WIDTH**-0.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), written_out(query, layer, None, WIDTH**-0.5), rtol=1e-2, atol=1e-2)
