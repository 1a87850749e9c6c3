"""Attention over packed NSNQuant keys and values in Triton's interpreter, against all that is read back in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.kernels.triton import compat, configs, kv_attention, weight_only
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.nsn_store import NSNStore
from quantkit.kv.nsnquant import Config, layer_kv
from quantkit.kv.packed_attention import attend
from quantkit.kv.rope import Rope

WINDOW, SINK = 16, 4
TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def _programs(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are chunks."""
    monkeypatch.setattr(kv_attention, "_PROGRAMS", 64)


@pytest.fixture
def kernel(interpreted_kv_attention: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``attend`` takes the kernel as on a GPU, and for float32, too; sequences of each of its calls."""
    launched: list[int] = []
    run = kv_attention.attend

    def counted(query: Tensor, *rest: Any) -> Tensor:
        launched.append(len(query))
        return run(query, *rest)

    monkeypatch.setattr(kv_attention, "_on_gpu", lambda _: True)
    monkeypatch.setattr(kv_attention, "DTYPES", (*kv_attention.DTYPES, torch.float32))
    monkeypatch.setattr(weight_only, "incapable", lambda _: None)
    monkeypatch.setattr(kv_attention, "attend", counted)
    return launched


def rope(width: int, share: float = 1.0, interleaved: bool = False) -> Rope:
    dim = int(width * share)
    return Rope(tuple(1e4 ** (-2 * j / dim) for j in range(dim // 2)), interleaved)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(
    tokens: int, turned: Rope | None, batch: int = 2, heads: int = 2, width: int = 64, value_width: int = 0,
    dtype: torch.dtype = torch.float32, **settings: Any,
) -> QuantisedLayer:  # fmt: skip
    """Keys with channels that are biased, values of very different lengths."""
    config = Config(**{"window": WINDOW, "sink": SINK, "min_recent": 0} | settings)
    value_width = value_width or width
    layer = QuantisedLayer(layer_kv(config, width, value_width, turned))
    keys = normal(batch, heads, tokens, width, seed=1) + 2 * normal(width, seed=2)
    values = normal(batch, heads, tokens, value_width, seed=3) + 0.5
    values *= torch.logspace(-1, 1, tokens)[torch.randperm(tokens, generator=torch.Generator().manual_seed(4)), None]
    layer.update(keys.to(dtype), values.to(dtype))
    return layer


def written_out(
    query: Tensor, layer: QuantisedLayer, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """In float64, of all that is read back."""
    keys, values = (
        store.read(0, store.length, torch.float64).repeat_interleave(query.shape[1] // layer.heads, dim=1)
        for store in layer.stores
    )
    logits = query.double() @ keys.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1) @ values


def check(layer: QuantisedLayer, query: Tensor, mask: Tensor | None = None, softcap: float | None = None) -> None:
    scaling = query.shape[-1] ** -0.5
    found = attend(query, layer, mask, scaling, softcap)
    assert found.dtype == query.dtype
    expected = written_out(query, layer, mask, scaling, softcap)
    assert found.shape == expected.shape
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < (TOLERANCE if query.dtype != torch.float32 else 1e-5), error


@pytest.mark.parametrize("tokens", [1, SINK + 3, SINK + WINDOW, SINK + 3 * WINDOW + 5])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_over_what_is_read_back(kernel, dtype, bits, tokens):
    """Sink or tail alone, nothing packed, one chunk and no tail, several chunks."""
    layer = filled(tokens, rope(64), batch=1, heads=1, dtype=dtype, bits=bits)
    check(layer, normal(1, 4, 1, 64, seed=5).to(dtype))
    assert kernel == [1]


@pytest.mark.parametrize("shared", [1, 7, 16])
def test_queries_that_share_a_head(kernel, shared):
    layer = filled(SINK + WINDOW + 1, rope(64), batch=1)
    check(layer, normal(1, 2 * shared, 1, 64, seed=5))
    assert kernel == [1]


def test_bfloat16(kernel):
    """In the interpreter as float32, but for the query and the tokens as they came."""
    layer = filled(SINK + WINDOW + 3, rope(64), batch=1, dtype=torch.bfloat16)
    check(layer, normal(1, 4, 1, 64, seed=5).bfloat16())


@pytest.mark.parametrize(
    ("turned", "settings"),
    [
        (rope(64, 0.5), {}),
        (rope(64, 0.25, interleaved=True), {"preset": "paper"}),
        (rope(64, interleaved=True), {"bits": 1}),
        (None, {"bits_v": 1}),
        (rope(64), {"key_shift": "post_rope", "mean_bits_k": 4}),
        (rope(64), {"key_shift": "none", "sink": 0}),
        (rope(64), {"gain_k": "mse", "mean_bits_v": 8, "min_recent": 8, "window": 32}),
    ],
    ids=["half", "quarter, interleaved", "interleaved", "no rope", "behind rope", "no shift", "window"],
)
def test_means_of_keys_of_every_kind(kernel, turned, settings):
    check(filled(80, turned, 1, 1, **settings), normal(1, 2, 1, 64, seed=5))
    assert kernel == [1]


@pytest.mark.parametrize(("width", "value_width"), [(128, 128), (80, 80), (64, 24), (16, 96)])
def test_heads_of_any_width(kernel, width, value_width):
    """24, 80 and 96 are no powers of two, and of 24 the Hadamard matrix is not symmetric."""
    layer = filled(SINK + WINDOW + 1, rope(width), 1, 2, width, value_width)
    check(layer, normal(1, 2 * 2, 1, width, seed=5))
    assert kernel == [1]


def test_caps_and_masks(kernel):
    tokens = SINK + 2 * WINDOW + 9
    layer, query = filled(tokens, rope(64), heads=1), 3 * normal(2, 2, 1, 64, seed=5)
    check(layer, query, softcap=2.0)
    padding = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    padding[0, ..., : SINK + WINDOW + 3] = False
    check(layer, query, padding)
    holes = normal(1, 1, 1, tokens, seed=6) > 0.3
    check(layer, query, holes, softcap=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_numbers_that_are_added(kernel, dtype):
    """For each head, or for each sequence; the lowest that there are stand for what is not seen."""
    tokens = SINK + WINDOW + 9
    layer, query = filled(tokens, rope(64), 1, dtype=dtype), normal(1, 2 * 2, 1, 64, seed=5).to(dtype)
    by_head = normal(2, 4, 1, tokens, seed=6).to(dtype)
    check(layer, query, torch.where(by_head > 0, 0.0, torch.finfo(dtype).min).to(dtype)[:1, :1])
    check(layer, query, by_head.transpose(0, 1).contiguous().transpose(0, 1)[1:])


def test_who_sees_nothing_gets_zero(kernel):
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1] = False
    found = attend(normal(2, 1, 1, 64), filled(40, rope(64), heads=1), mask, 1.0)
    assert found[1].eq(0).all()
    assert found[0].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_large_numbers_do_not_overflow(kernel, dtype):
    """Half numbers end at 65504: queries of that size, logits that differ a lot, values that nearly are."""
    layer = filled(SINK + 2 * WINDOW + 3, rope(64), batch=1, dtype=dtype)
    check(layer, (10000 * normal(1, 2, 1, 64, seed=5)).to(dtype))
    large = QuantisedLayer(layer_kv(Config(window=WINDOW, min_recent=0), 64, 64, rope(64)))
    large.update(*(20000 * normal(1, 2, 40, 64, seed=seed).clamp(-3, 3).to(dtype) for seed in (1, 3)))
    check(large, (1e-3 * normal(1, 2, 1, 64, seed=5)).to(dtype))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_head(kernel):
    layer = QuantisedLayer(layer_kv(Config(window=WINDOW, sink=0, min_recent=0), 64, 64, rope(64)))
    keys, values = normal(1, 2, 40, 64, seed=1), normal(1, 2, 40, 64, seed=3)
    keys[0, 1, 20, 5] = torch.nan
    layer.update(keys, values)
    found = attend(normal(1, 4, 1, 64, seed=5), layer, None, 0.125)
    assert found[:, :2].isfinite().all()
    assert found[:, 2:].isnan().all()


def test_token_by_token_and_what_was_dropped(kernel, monkeypatch):
    """An arena with room behind the chunks; other sequences; chunks that are not the first ones."""
    monkeypatch.setattr(kv_attention, "_PROGRAMS", 2)
    layer, query = filled(SINK + 8 * WINDOW, rope(64), heads=1), normal(2, 1, 1, 64, seed=5)
    for new in normal(WINDOW + 3, 2, 1, 1, 64, seed=7):
        layer.update(new, new)
    keys, values = layer.stores
    assert isinstance(keys, NSNStore)
    assert keys._arena.count > keys.view().chunks.count == 9
    check(layer, query)
    layer.reorder_cache(torch.tensor([1, 0]))
    check(layer, query)
    for store in (keys, values):
        store.keep(SINK + 7 * WINDOW, store.length)
    assert keys.view().start == SINK + 7 * WINDOW
    check(layer, query)


@pytest.mark.parametrize("programs", [1, 2, 64])
def test_however_many_programs_share_a_head(kernel, monkeypatch, programs):
    monkeypatch.setattr(kv_attention, "_PROGRAMS", programs)
    check(filled(SINK + 5 * WINDOW + 1, rope(64), 1, 1), normal(1, 2, 1, 64, seed=5))
    assert [kv_attention.share(1, chunks, 1) for chunks in (0, 1, 5, 64)] == {
        1: [1, 1, 5, 64], 2: [1, 1, 3, 32], 64: [1, 1, 1, 1],
    }[programs]  # fmt: skip


def test_it_is_what_the_readers_compute(kernel, monkeypatch):
    layer, query = filled(SINK + 2 * WINDOW + 7, rope(64, 0.5), heads=1), normal(2, 4, 1, 64, seed=5)
    mask = torch.arange(SINK + 2 * WINDOW + 7)[None, None, None] > torch.tensor([0, 7])[:, None, None, None]
    found = attend(query, layer, mask, 0.125, 20.0)
    assert kernel == [2]
    monkeypatch.setattr(kv_attention, "refuses", lambda *_: "for a comparison")
    torch.testing.assert_close(found, attend(query, layer, mask, 0.125, 20.0), rtol=1e-4, atol=1e-5)
    assert kernel == [2]


def test_several_queries_are_read_block_by_block(kernel):
    check(filled(40, rope(64)), normal(2, 2, 3, 64, seed=5))
    assert not kernel


def test_operator_has_shapes_without_data_and_passes_opcheck(interpreted_kv_attention):
    keys, values = (store.view() for store in filled(SINK + WINDOW + 3, rope(64), 1, 1).stores)
    sides = [[*kv_attention._side(view)] for view in (keys, values)]
    waves, starts = torch.zeros(2, WINDOW, 32), torch.zeros(64, 64)
    arguments = (normal(1, 1, 1, 64), None, 0.125, None, *sides, waves, starts, 0, WINDOW, False)
    torch.library.opcheck(torch.ops.quantkit.kv_attention.default, arguments)


@pytest.mark.parametrize(
    ("changes", "query", "reason"),
    [
        ({}, (torch.float16, 4, 1), None),
        ({}, (torch.float16, 4, 2), "for one query, not 2"),
        ({}, (torch.float32, 4, 1), "for half and bfloat16 models, not float32"),
        ({}, (torch.bfloat16, 4, 1), "keys, values and queries differ in their dtype or their device"),
        ({}, (torch.float16, 34, 1), "for up to 16 queries of a head, not 17"),
        ({"window": 24}, (torch.float16, 4, 1), "for chunks of 16, 32, 64, 128 tokens, not 24"),
        ({"width": 264}, (torch.float16, 4, 1), "for up to 256 channels of a head, not 264"),
        ({"width": 136, "window": 128}, (torch.float16, 4, 1), "for up to 128 channels of a head, not 136"),
    ],
)
def test_says_what_it_does_not_take(monkeypatch, changes, query, reason):
    keys, values = (store.view() for store in filled(30, None, 1, dtype=torch.float16, **changes).stores)
    dtype, heads, count = query
    asked = torch.zeros(1, heads, count, keys.tail.shape[-1], dtype=dtype)
    assert kv_attention.refuses(asked, keys, values) == "for GPUs, not cpu"
    monkeypatch.setattr(kv_attention, "_on_gpu", lambda _: True)
    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("sm_90", 132))
    assert kv_attention.refuses(asked, keys, values) == reason
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("sm_75", 72))
    assert kv_attention.refuses(asked, keys, values) is not None


def test_keys_that_are_packed_elsewhere_than_values(monkeypatch):
    monkeypatch.setattr(kv_attention, "_on_gpu", lambda _: True)
    monkeypatch.setattr(compat, "AVAILABLE", True)
    (keys, _), (_, values) = (
        [store.view() for store in filled(tokens, None, 1, dtype=torch.float16).stores] for tokens in (30, 31)
    )
    query = torch.zeros(1, 2, 1, 64, dtype=torch.float16)
    assert kv_attention.refuses(query, keys, values) == "keys are packed at other places than values"
