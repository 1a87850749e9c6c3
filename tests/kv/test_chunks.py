"""A layer whose stores keep tokens in groups: what is coded when, what can be taken back, what stays alive."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kv.cache import KVCache, QuantisedLayer
from quantkit.kv.chunks import ChunkStore
from quantkit.kv.interface import LayerKV
from quantkit.kv.kivi import Keys, Values

KIVI = LayerKV(Keys(2, 8, 16), Values(2, 8, 16))
"""Groups of 8, 16 tokens at a time."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(split: list[int], kv: LayerKV = KIVI, batch: int = 2) -> QuantisedLayer:
    tokens = sum(split)
    keys, values = drawn(batch, 3, 100, 24)[:, :, :tokens], drawn(batch, 3, 100, 16, seed=1)[:, :, :tokens]
    layer = QuantisedLayer(kv)
    for k, v in zip(keys.split(split, dim=2), values.split(split, dim=2), strict=True):
        layer.update(k, v)
    return layer


def codes(layer: QuantisedLayer) -> list[Tensor]:
    return list(layer.tensors())


@pytest.mark.parametrize("split", [[1] * 61, [60, 1], [7, 1, 1, 31, 16, 5], [16, 45]], ids=str)
def test_codes_do_not_depend_on_the_split(split):
    for found, expected in zip(codes(filled(split)), codes(filled([61])), strict=True):
        assert torch.equal(found, expected)


def test_what_is_coded_is_never_coded_again():
    layer = filled([40])
    before = [tensor.clone() for store in (layer._keys, layer._values) for tensor in store._parts.values()]
    for step in range(40):
        layer.update(drawn(2, 3, 1, 24, seed=step) * 100, drawn(2, 3, 1, 16, seed=step) * 100)
    after = [tensor for store in (layer._keys, layer._values) for tensor in store._parts.values()]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new[:, :, : old.shape[2]])
        assert new.shape[2] > old.shape[2]


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("recent", [0, 5])
def test_chunk_arithmetic(chunks, extra, recent):
    """Right before, at, and right behind the token that makes a chunk due."""
    tokens = recent + 16 * chunks + extra
    if tokens < 1:
        return
    store = ChunkStore(Keys(2, 8, 16), unit=8, chunk=16, recent=recent)
    store.append(drawn(1, 2, tokens, 8))
    expected = 16 * (chunks - (extra < 0)) if chunks else 0
    assert (store.coded, store.length) == (expected, tokens)
    assert store.elements == 2 * tokens * 8


def test_a_prompt_of_255_and_the_steps_behind_it():
    store = ChunkStore(Keys(2, 32, 64), unit=32, chunk=64)
    seen = []
    store.append(drawn(1, 1, 255, 8))
    for _ in range(255, 384):
        seen.append(store.coded)
        store.append(drawn(1, 1, 1, 8))
    assert store.coded == 384
    assert [seen.count(length) for length in (192, 256, 320)] == [1, 64, 64]


def test_batches_take_their_codes_along():
    layer, single = filled([45]), [filled([45]) for _ in range(2)]
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0, 2]))
    layer.offload()
    layer.prefetch()
    single[0].batch_select_indices(torch.tensor([1]))
    k, v = drawn(1, 3, 20, 24, seed=7), drawn(1, 3, 20, 16, seed=8)
    expected = single[0].update(k, v)
    found = layer.update(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    for three, one in zip(found, expected, strict=True):
        assert torch.equal(three, one.expand(3, -1, -1, -1))
    layer.reset()
    assert (layer.get_seq_length(), layer.elements, list(layer.tensors())) == (0, 0, [])
    layer.update(k, v)
    for found_one, expected_one in zip(codes(layer), codes(_of(k, v)), strict=True):
        assert torch.equal(found_one, expected_one)


def _of(keys: Tensor, values: Tensor) -> QuantisedLayer:
    layer = QuantisedLayer(KIVI)
    layer.update(keys, values)
    return layer


def test_crop_takes_back_the_tail_and_whole_groups():
    layer = filled([45])  # keys: 32 coded, 13 in the tail; values: 29 coded
    layer.crop(-13)
    assert (layer._keys.length, layer._values.length, layer.get_seq_length()) == (32, 32, 32)
    layer.crop(-8)
    assert layer._keys.length == 24
    before = [tensor.clone() for tensor in codes(layer)]
    with pytest.raises(
        QuantkitError, match=r"the last 3 tokens cannot be taken back: 3 of them .* groups of 8 .*activate"
    ):
        layer.crop(-3)
    assert layer.get_seq_length() == 24
    for old, new in zip(before, codes(layer), strict=True):
        assert torch.equal(old, new)
    layer.update(drawn(2, 3, 9, 24), drawn(2, 3, 9, 16))
    assert layer.get_seq_length() == 33
    layer.crop(-100)
    assert layer.get_seq_length() == layer.elements == 0
    layer.update(drawn(2, 3, 9, 24), drawn(2, 3, 9, 16))


def test_a_cropped_layer_reads_as_one_that_never_saw_the_tokens():
    layer, other = filled([45]), filled([40])
    layer.crop(-5)
    k, v = drawn(2, 3, 1, 24, seed=7), drawn(2, 3, 1, 16, seed=8)
    found, expected = layer.update(k, v), other.update(k, v)
    assert torch.equal(found[0], expected[0])
    # Values that were coded stay so: the other layer still has 16 of them as they came.
    assert torch.equal(found[1][:, :, :25], expected[1][:, :, :25])
    assert torch.equal(found[1][:, :, 29:], expected[1][:, :, 29:])


def test_what_may_be_taken_back_is_not_coded_before_the_next_crop():
    layer = filled([12])
    KVCache([layer]).activate_past_recording()
    for _ in range(2):  # 18 and 24 tokens: 16 would be due
        layer.update(drawn(2, 3, 6, 24), drawn(2, 3, 6, 16))
        assert (layer._keys.coded, layer._values.coded) == (0, 0)
    layer.crop(-10)
    assert (layer._keys.coded, layer._values.coded, layer.get_seq_length()) == (0, 0, 14)
    layer.update(drawn(2, 3, 6, 24), drawn(2, 3, 6, 16))
    layer.crop(0)
    assert (layer._keys.coded, layer._values.coded, layer.get_seq_length()) == (16, 4, 20)
    layer.update(drawn(2, 3, 20, 24), drawn(2, 3, 20, 16))
    layer.record_past = False
    layer.update(drawn(2, 3, 1, 24), drawn(2, 3, 1, 16))
    assert (layer._keys.coded, layer._values.coded) == (32, 25)


def test_the_prompt_in_full_precision_does_not_stay_alive():
    """Neither the tensor that came in, nor the memory of which the tail is a part."""
    layer = QuantisedLayer(KIVI)
    states = drawn(2, 3, 100, 64).half()
    came = weakref.ref(states.untyped_storage())
    keys, values = layer.update(states[..., :24], states[..., 24:40])
    del states, keys, values
    assert came() is None
    assert max(tensor.untyped_storage().nbytes() for tensor in layer.tensors()) < 2 * 3 * 100 * 16
    cache = KVCache([layer])
    assert cache.memory_report().bytes == sum(tensor.nbytes for tensor in layer.tensors())
    assert cache.memory_report().elements == 2 * 3 * 100 * 40


def test_the_same_input_gives_the_same_bytes():
    for one, other in zip(codes(filled([61])), codes(filled([61])), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((3, 3, 1, 24), (3, 3, 1, 16), "keys of 2 sequences with 3 heads of 24 numbers and was given 3 sequences"),
        (
            (2, 4, 1, 24),
            (2, 4, 1, 16),
            "given 2 sequences with 4 heads of 24 numbers: it is of another batch or another",
        ),
        ((2, 3, 1, 32), (2, 3, 1, 16), "with 3 heads of 32 numbers"),
        ((2, 3, 1, 24), (2, 3, 1, 8), "the cache holds values of"),
    ],
)
def test_another_batch_or_model_is_refused(keys, values, message):
    layer = filled([20])
    with pytest.raises(QuantkitError, match=message):
        layer.update(drawn(*keys), drawn(*values))
    layer.update(drawn(2, 3, 1, 24), drawn(2, 3, 1, 16))  # nothing was changed
    layer.reset()
    layer.update(drawn(*keys), drawn(*values))


def test_another_number_of_layers_is_refused():
    k, v = drawn(1, 1, 2, 8), drawn(1, 1, 2, 8)
    small = KVCache([QuantisedLayer(KIVI)])
    small.update(k, v, 0)
    with pytest.raises(QuantkitError, match="a model of 1 layers and was given keys of layer 1"):
        small.update(k, v, 1)
    large = KVCache([QuantisedLayer(KIVI), QuantisedLayer(KIVI)])
    large.update(k, v, 0)
    with pytest.raises(QuantkitError, match="a model with 2 quantised layers, of which 1 hold all tokens"):
        large.update(k, v, 0)
