"""What a store of NSNQuant holds: the same however tokens came, never coded again, and where its chunks end."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import TINY, VOCABULARY, make_tiny
from torch import Tensor
from transformers import DynamicCache

from quantkit.errors import QuantkitError
from quantkit.kernels import hadamard
from quantkit.kv.cache import QuantisedLayer, new_cache
from quantkit.kv.interface import ChunkedStore
from quantkit.kv.memory import memory_report
from quantkit.kv.nsn_store import NSNStore
from quantkit.kv.nsnquant import NSN, Config, layer_kv
from quantkit.kv.rope import Rope, rope_of

WIDTH = 24
ROPE = Rope((1.0, 0.3, 0.1, 0.03))


def method(**settings: Any) -> NSN:
    """Of keys, with small chunks."""
    keys = layer_kv(Config(**({"window": 16, "sink": 3, "min_recent": 5} | settings)), WIDTH, WIDTH, ROPE).keys
    assert isinstance(keys, NSN)
    return keys


def drawn(tokens: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    states = torch.randn(batch, 3, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
    return (states + 2).to(dtype)


def filled(nsn: NSN, states: Tensor, splits: list[int]) -> NSNStore:
    store = nsn.store()
    for part in states.split(splits, dim=2):
        store.append(part)
    return store


def assert_equal(found: NSNStore, expected: NSNStore) -> None:
    one, other = found.state(), expected.state()
    assert one.keys() == other.keys()
    for name, part in one.items():
        assert torch.equal(part, other[name]), name


def packed(store: NSNStore) -> int:
    view = store.view()
    return 0 if view is None or view.chunks is None else view.chunks.count


@pytest.mark.parametrize("settings", [{"bits": 1}, {"bits": 2}, {"sink": 0, "min_recent": 0}, {"preset": "paper"}])
def test_the_split_does_not_matter(settings):
    nsn, states = method(**settings), drawn(130)
    whole = filled(nsn, states, [130])
    for splits in ([1] * 130, [1, 2, 127], [0, 40, 0, 41, 49], [64, 66], [129, 1]):
        assert_equal(filled(nsn, states, splits), whole)
    assert packed(whole) == (130 - nsn.sink - nsn.min_recent) // 16


def test_chunks_of_the_usual_size():
    """255 tokens of a prompt, then one at a time: as the paper counts them, 192 are packed, then 256, 320 and 384."""
    nsn = method(window=64, sink=0, min_recent=0)
    states = drawn(384, batch=1)
    store = filled(nsn, states[:, :, :255], [255])
    assert (packed(store), store.view().tail.shape[2]) == (3, 63)
    for token in range(255, 384):
        store.append(states[:, :, token : token + 1])
        assert packed(store) == (token + 1) // 64
    assert_equal(store, filled(nsn, states, [384]))


@pytest.mark.parametrize("tokens", [3 + 5 + 32 + more for more in (-1, 0, 1)])
def test_where_chunks_end(tokens):
    store = filled(method(), drawn(tokens), [tokens])
    count = 2 if tokens >= 40 else 1
    view = store.view()
    assert (packed(store), view.sink.shape[2], view.tail.shape[2]) == (count, 3, tokens - 3 - 16 * count)
    assert view.starts.tolist() == [3, 19][:count]
    assert store.length == tokens


def test_what_is_packed_never_changes():
    nsn, states = method(), drawn(200)
    store = nsn.store()
    seen: dict[int, dict[str, bytes]] = {}
    read = torch.zeros(0)
    for token in range(200):
        before, read = read, store.append(states[:, :, token : token + 1])
        view = store.view()
        if view.chunks is None:
            continue
        for number in range(view.chunks.count):
            now = {name: t[:, :, number].numpy().tobytes() for name, t in view.chunks.tensors().items()}
            assert seen.setdefault(number, now) == now
        old = 3 + 16 * (view.chunks.count - 1)
        assert torch.equal(read[:, :, :old], before[:, :, :old])
    assert len(seen) == 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [1, 2])
def test_a_store_reads_back_what_round_gives(bits, dtype):
    nsn, states = method(bits=bits), drawn(77, dtype)
    store = nsn.store()
    store.append(states[:, :, :30])
    read = store.append(states[:, :, 30:])
    assert read.dtype == dtype
    assert torch.equal(read, nsn.round(states))
    assert torch.equal(read, nsn.round(states.clone().requires_grad_()))
    assert torch.equal(read[:, :, :3], states[:, :, :3])
    assert torch.equal(read[:, :, 67:], states[:, :, 67:])
    assert not (read[:, :, 3:67] == states[:, :, 3:67]).all(dim=(0, 1, 3)).any()
    assert (store.length, store.elements) == (77, 2 * 3 * 77 * WIDTH)


def test_chunks_are_coded_where_they_are():
    """Behind a sink, the mean of a chunk is taken and put back at the positions of its tokens."""
    nsn, states = method(), drawn(3 + 3 * 16 + 5)
    chunks, starts = states[:, :, 3:51].unflatten(2, (3, 16)), torch.tensor([3, 19, 35])
    expected = nsn.coder.decode(nsn.coder.encode(chunks, starts), starts, torch.float32)
    assert torch.equal(nsn.round(states)[:, :, 3:51], expected.flatten(2, 3))


def test_short_and_empty():
    nsn = method()
    store = nsn.store()
    assert isinstance(store, ChunkedStore)
    assert (store.length, store.elements, list(store.tensors()), store.view()) == (0, 0, [], None)
    store.keep(0, 0)
    store.change(torch.clone)
    assert store.append(drawn(7)[:, :, :0]).shape == (2, 3, 0, WIDTH)
    for tokens in range(1, 8):
        states = drawn(tokens)
        assert torch.equal(nsn.round(states), states)
    assert nsn.round(drawn(7)[:, :, :0]).shape == (2, 3, 0, WIDTH)


@pytest.mark.parametrize("settings", [{"bits": 1, "codebook": "kmeans"}, {"bits": 2}, {"key_shift": "none"}])
def test_the_view_says_all(settings):
    """What its parts are documented to be, multiplied out one by one."""
    nsn, states = method(**settings), drawn(90)
    store = filled(nsn, states, [90])
    view, read = store.view(), store.append(states[:, :, :0])
    chunks, book = view.chunks, view.coder.codebook.vectors
    expected = [view.sink]
    for number in range(chunks.count):
        q = book[chunks.codes[:, :, number].long()].float()  # [batch, heads, W, d / 8, 8]
        if chunks.signs is not None:
            bits = chunks.signs[:, :, number, :, :, None].int() >> torch.arange(8) & 1
            q = q * (2 * bits - 1)
        x = q.flatten(-2) * chunks.gain[:, :, number, :, None].float()
        x = x @ torch.linalg.inv(_hadamard().T)
        if chunks.mean_codes is not None:
            step, low = chunks.mean_range[:, :, number].float().unbind(-1)  # [batch, heads, groups]
            mean = chunks.mean_codes[:, :, number].unflatten(-1, (len(step[0, 0]), -1)) * step[..., None]
            mean = (mean + low[..., None]).flatten(-2)
            slots = view.starts[number] + torch.arange(16)
            x = x + view.coder.rope.rotate(mean[:, :, None].expand_as(x), slots)
        codes = chunks.norm_codes[:, :, number]
        norms = torch.stack([codes % 16, codes // 16], dim=-1).flatten(-2)
        step, low = chunks.norm_range[:, :, number].float().split(1, dim=-1)
        expected.append((norms * step + low)[..., None] * x)
    torch.testing.assert_close(read, torch.cat([*expected, view.tail], dim=2), rtol=1e-5, atol=1e-5)


def _hadamard() -> Tensor:
    return hadamard.multiply(torch.eye(WIDTH)).T / WIDTH**0.5


# --- taking tokens back and dropping them ----------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1, 3, 19, 35, 67, 68, 75, 79, 80, 99])
def test_tokens_that_can_be_taken_back(last):
    """80 tokens: 3, 4 chunks of 16, 13. Behind what is left it goes on as if they had never been there."""
    nsn, states = method(), drawn(80)
    store = filled(nsn, states, [80])
    read = store.append(states[:, :, :0])
    store.keep(0, last)
    last = min(last, 80)
    assert store.length == last
    assert torch.equal(store.append(states[:, :, :0]), read[:, :, :last])
    more = drawn(81)
    store.append(more)
    held = packed(filled(nsn, states[:, :, :80], [80]))
    if last > 3 + 16 * held or last <= 3:  # else more is packed than would be
        assert_equal(store, filled(nsn, torch.cat([states[:, :, :last], more], dim=2), [last, 81]))
    assert store.length == last + 81


@pytest.mark.parametrize("last", [4, 18, 20, 34, 66])
def test_chunks_are_not_parted(last):
    store = filled(method(), drawn(80), [80])
    before = {name: part.clone() for name, part in store.state().items()}
    with pytest.raises(QuantkitError, match=f"{67 - last} of them are packed, in chunks of 16 .* min_recent"):
        store.keep(0, last)
    assert all(torch.equal(part, before[name]) for name, part in store.state().items())


def test_as_many_as_min_recent_can_always_be_taken_back():
    nsn = method(min_recent=5)
    for tokens in range(20, 60):
        store = filled(nsn, drawn(tokens), [tokens])
        store.keep(0, tokens - 5)
        assert store.length == tokens - 5


def test_tokens_in_front_go_by_chunks():
    nsn, states = method(), drawn(120)
    store = filled(nsn, states[:, :, :90], [90])  # 3, 5 chunks, 7
    everything = store.append(states[:, :, :0])
    for first, held in ((0, 90), (2, 88), (3, 87), (18, 87), (19, 71), (36, 55), (80, 23), (82, 23), (90, 7)):
        surplus = max(0, first - (90 - store.length))
        store.keep(surplus, store.length)
        assert store.length == held
        assert torch.equal(store.append(states[:, :, :0]), everything[:, :, 90 - held :])
    store.append(states[:, :, 90:])
    assert torch.equal(store.append(states[:, :, :0]), filled(nsn, states, [120]).append(states[:, :, :0])[:, :, 83:])


@pytest.mark.parametrize("recent", [5, 20])
def test_chunks_of_a_window_are_those_of_the_whole(recent):
    """Token by token behind a window shorter than a chunk, as a layer drops them, packed or (20) never to be: positions
    and codes stay the same."""
    nsn, states = method(min_recent=recent), drawn(210)
    whole = filled(nsn, states, [210]).view()
    store, window = nsn.store(), 9
    for token in range(150):
        store.append(states[:, :, token : token + 1])
        if store.length > window:
            store.keep(store.length - window, store.length)
    assert store.length < 16 + 16 + 5
    tail = store.view().tail
    assert torch.equal(tail, states[:, :, 150 - tail.shape[2] : 150])
    store.append(states[:, :, 150:])
    view, left = store.view(), packed(store)
    assert left >= 3
    assert view.starts.tolist() == whole.starts[-left:].tolist()
    assert torch.equal(view.chunks.codes, whole.chunks.codes[:, :, -left:])


def test_nothing_is_packed_while_tokens_may_be_taken_back():
    nsn, states = method(), drawn(100)
    store = filled(nsn, states[:, :, :30], [30])
    store.hold = True
    assert torch.equal(store.append(states[:, :, 30:])[:, :, 19:], states[:, :, 19:])
    store.keep(0, 60)
    store.hold = False
    store.settle()
    assert_equal(store, filled(nsn, states[:, :, :60], [60]))


# --- the batch, memory, gradients ------------------------------------------------------------------------------------


def test_sequences_are_chosen_with_their_codes():
    nsn, states = method(), drawn(80, batch=3)
    store = filled(nsn, states, [80])
    store.change(lambda part: part.index_select(0, torch.tensor([2, 0, 0, 1])))
    assert_equal(store, filled(nsn, states[[2, 0, 0, 1]], [80]))
    more = drawn(30, batch=4)
    store.append(more)
    assert_equal(store, filled(nsn, torch.cat([states[[2, 0, 0, 1]], more], dim=2), [80, 30]))


def test_a_row_is_the_same_in_any_batch():
    nsn, states = method(bits=1), drawn(100, batch=4)
    alone = filled(nsn, states[2:3], [100])
    together = filled(nsn, states, [100])
    together.change(lambda part: part[2:3])
    assert_equal(together, alone)


@pytest.mark.parametrize("tokens", [2, 40, 100])
def test_saving_goes_on_as_before(tokens):
    nsn, states = method(), drawn(150)
    store = filled(nsn, states[:, :, :tokens], [tokens])
    if tokens == 100:
        store.keep(20, 100)
    other = nsn.store()
    other.load({name: part.clone() for name, part in store.state().items()})
    for one in (store, other):
        one.append(states[:, :, tokens:])
    assert_equal(other, store)
    empty = nsn.store()
    empty.load(nsn.store().state())
    assert empty.length == 0


@pytest.mark.parametrize(("bits", "expected"), [(1, 1.238), (2, 2.238)])
def test_what_it_takes(bits, expected):
    """Packed chunks as the formula has it; with all that is alive a little more, at most an eighth for growing."""
    kv = layer_kv(Config(preset="paper", bits=bits, min_recent=0), 128, 128, None)
    states = torch.randn(1, 1, 64 * 64, 128, generator=torch.Generator().manual_seed(0))
    layer = QuantisedLayer(kv)
    layer.update(states, states)
    parts = [part for store in (layer._keys, layer._values) for part in store.view().chunks.tensors().values()]
    assert 8 * sum(part.nbytes for part in parts) / layer.elements == pytest.approx(expected, rel=0.005)
    cache = DynamicCache()
    cache.layers.append(layer)
    fixed = 2 * 256 * 8 + 4 * 128 * 128  # one codebook and one matrix, for keys and values
    assert memory_report(cache).bytes == sum(part.nbytes for part in parts) + fixed
    layer.update(states[:, :, :64], states[:, :, :64])
    grown = memory_report(cache).bytes - fixed
    assert grown <= 1.13 * sum(part.nbytes for part in parts) * 65 / 64


def test_the_prompt_is_let_go():
    states = drawn(100)
    gone = weakref.ref(states)
    store = method().store()
    store.append(states)
    storage = states.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() != storage for part in store.tensors())
    own = (store.view().sink, store.view().tail)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in own)
    del states
    assert gone() is None


def test_arenas_of_inference_mode_are_written_to_outside_of_it():
    nsn, states = method(), drawn(300)
    store = nsn.store()
    with torch.inference_mode():
        for part in states[:, :, :140].split(10, dim=2):
            store.append(part)
        store.change(torch.clone)  # as a beam search does; 8 chunks with room for one more
    for part in states[:, :, 140:].split(1, dim=2):
        store.append(part)
    assert_equal(store, filled(nsn, states, [300]))


def test_autocast_changes_nothing():
    nsn, states = method(), drawn(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        store = filled(nsn, states, [100])
    assert_equal(store, filled(nsn, states, [100]))


def test_gradients_reach_what_a_store_is_given():
    nsn, states = method(), drawn(60)
    store = filled(nsn, states[:, :, :30], [30])
    given = states[:, :, 30:].clone().requires_grad_()
    read = store.append(given)
    assert torch.equal(read, nsn.round(states))
    read.sum().backward()
    assert (given.grad == 1).all()
    assert not any(part.requires_grad for part in store.tensors())


# --- in a model ------------------------------------------------------------------------------------------------------


def ids_of(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def cached(model: Any, **settings: Any) -> Any:
    config = Config(**({"window": 16, "min_recent": 16} | settings))
    layers = range(model.config.num_hidden_layers)
    width = model.config.hidden_size // model.config.num_attention_heads
    return new_cache(model.config, {layer: layer_kv(config, width, width, rope_of(model, layer)) for layer in layers})


SETTINGS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_short_texts_are_exact():
    model, ids = make_tiny(TINY["llama"]()), ids_of(2, 12)
    expected = model.generate(ids, max_new_tokens=20, **SETTINGS)
    found = model.generate(ids, max_new_tokens=20, past_key_values=cached(model), **SETTINGS)
    assert found.tolist() == expected.tolist()  # 4 + 16 + 15 stay as they are


@pytest.mark.parametrize("bits", [1, 2])
def test_generating_goes_on_where_it_stopped(bits):
    model, ids = make_tiny(TINY["llama"]()).double(), ids_of(2, 40)
    whole = model.generate(ids, max_new_tokens=30, past_key_values=cached(model, bits=bits), **SETTINGS)
    cache = cached(model, bits=bits)
    first = model.generate(ids, max_new_tokens=10, past_key_values=cache, **SETTINGS)
    assert model.generate(first, max_new_tokens=20, past_key_values=cache, **SETTINGS).tolist() == whole.tolist()
    store = cache.layers[0]._keys
    assert packed(store) == (69 - 4 - 16) // 16


def beams_apart(model: Any, ids: Tensor, beams: int, tokens: int) -> list[int]:
    """Beam search in which every path fills a cache of its own, a token at a time behind the prompt."""
    paths = [(0.0, ids)]
    for _ in range(tokens):
        found = []
        for score, path in paths:
            cache = cached(model)
            with torch.no_grad():
                for part in path.split([ids.shape[1]] + [1] * (path.shape[1] - ids.shape[1]), dim=1):
                    logits = model(part, past_key_values=cache, use_cache=True).logits
            best = logits[0, -1].log_softmax(-1).topk(2 * beams)
            for gain, token in zip(best.values.tolist(), best.indices, strict=True):
                found.append((score + gain, torch.cat([path, token.view(1, 1)], dim=1)))
        paths = sorted(found, key=lambda pair: -pair[0])[:beams]
    result: list[int] = paths[0][1][0].tolist()
    return result


def test_beams_take_their_codes_along():
    """The second chunk is packed while the beams change places."""
    model, ids = make_tiny(TINY["llama"]()).double(), ids_of(1, 46)
    settings = {**SETTINGS, "length_penalty": 0.0}
    found = model.generate(ids, max_new_tokens=9, num_beams=3, past_key_values=cached(model), **settings)
    assert found[0].tolist() == beams_apart(model, ids, 3, 9)


def test_two_bits_are_nearer_than_one():
    model, ids = make_tiny(TINY["llama"]()), ids_of(2, 120)
    with torch.no_grad():
        expected = model(ids).logits
        errors = []
        for bits in (2, 1):
            logits = [
                model(part, past_key_values=cache, use_cache=True).logits
                for cache in [cached(model, bits=bits)]
                for part in ids.split(1, dim=1)
            ]
            errors.append((torch.cat(logits, dim=1) - expected)[:, 60:].square().mean().item())
    assert all(0 < one < 0.7 * other for one, other in pairwise(errors))


def test_a_layer_is_as_it_was_where_tokens_cannot_be_taken_back():
    model, ids = make_tiny(TINY["llama"]()), ids_of(1, 90)
    cache = cached(model, min_recent=0)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(QuantkitError, match="cannot be taken back"):
        cache.crop(-30)
    assert cache.get_seq_length() == 90
    layer = cache.layers[0]
    assert layer._keys.length == layer._values.length == 90
