"""Quantised layers against transformers' own, which are given keys and values that are rounded already."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from quantkit.kv.cache import KVCache, QuantisedLayer
from quantkit.kv.interface import LayerKV
from quantkit.kv.memory import memory_report
from quantkit.kv.quantiser import MinMax
from quantkit.kv.rotation import KeyMatrix, RandomHadamard

HEADS, KEY_DIM, VALUE_DIM = 3, 24, 16


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


KINDS = {
    "4 bits": LayerKV(MinMax(4), MinMax(4)),
    "3 and 8 bits": LayerKV(MinMax(3), MinMax(8, symmetric=True)),
    "hadamard": LayerKV(MinMax(4), MinMax(2), RandomHadamard("seed")),
    "dense": LayerKV(MinMax(4, symmetric=True), MinMax(4), KeyMatrix(drawn(KEY_DIM, KEY_DIM, seed=5))),
}


class Plain:
    """A method that keeps its input as it is, and the store of it: what else a layer may be given."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def store(self) -> Plain:
        return Plain()

    def round(self, states: Tensor) -> Tensor:
        return states

    @property
    def length(self) -> int:
        return 0 if self.held is None else self.held.shape[2]

    @property
    def elements(self) -> int:
        return 0 if self.held is None else self.held.numel()

    def append(self, states: Tensor) -> Tensor:
        self.held = states if self.held is None else torch.cat([self.held, states], dim=2)
        return self.held

    def keep(self, first: int, last: int) -> None:
        self.change(lambda held: held[:, :, first:last].clone())

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.held = None if self.held is None else change(self.held)

    def tensors(self) -> Iterable[Tensor]:
        return [] if self.held is None else [self.held]


class Pair:
    """A quantised layer, and one of transformers that does the same with rounded states."""

    def __init__(self, kv: LayerKV, window: int | None) -> None:
        self.kv = kv
        self.ours = QuantisedLayer(kv, window)
        self.theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
        self.calls = 0

    def update(self, batch: int, tokens: int) -> None:
        self.calls += 1
        keys, values = drawn(batch, HEADS, tokens, KEY_DIM, seed=self.calls), drawn(batch, HEADS, tokens, VALUE_DIM)
        assert self.ours.get_mask_sizes(tokens) == self.theirs.get_mask_sizes(tokens)
        found = self.ours.update(keys, values)
        expected = self.theirs.update(*self.kv.round(keys, values))
        assert [part.shape for part in found] == [part.shape for part in expected]
        for ours, theirs in zip(found, expected, strict=True):
            # A product with a matrix may differ in the last digit when other tokens are there, too; codes may not.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()

    def both(self, name: str, *arguments: object) -> None:
        for layer in (self.ours, self.theirs):
            getattr(layer, name)(*arguments)
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()
        assert self.ours.get_mask_sizes(3) == self.theirs.get_mask_sizes(3)


@pytest.mark.parametrize("window", [None, 2, 5, 40])
@pytest.mark.parametrize("kv", KINDS.values(), ids=KINDS)
def test_a_life_of_a_layer(kv, window):
    """Chunks, single tokens, beams, batches that grow and shrink, a reset, and again."""
    pair = Pair(kv, window)
    assert pair.ours.is_sliding == pair.theirs.is_sliding
    for _ in range(2):
        for tokens in (1, 4, 1, 1, 7):
            pair.update(2, tokens)
        pair.both("reorder_cache", torch.tensor([1, 1]))
        pair.update(2, 1)
        pair.both("batch_repeat_interleave", 3)
        pair.update(6, 2)
        pair.both("batch_select_indices", torch.tensor([0, 5, 3]))
        pair.update(3, 1)
        pair.ours.offload()
        pair.ours.prefetch()
        pair.update(3, 1)
        pair.both("reset")
        pair.update(4, 3)
        pair.both("reset")
        if window is not None:  # theirs keeps what it held
            pair.theirs = DynamicSlidingWindowLayer(window)


@pytest.mark.parametrize("window", [None, 5, 40])
def test_cropping(window):
    pair = Pair(KINDS["hadamard"], window)
    if window is not None:
        pair.both("activate_past_recording")
    for tokens, removed in ((9, 3), (2, 0), (1, 1), (1, 0), (4, 4), (3, 1)):
        pair.update(2, tokens)
        pair.both("crop", -removed)
    pair.update(2, 2)


def test_cropping_what_cannot_be_cropped():
    layer = Pair(KINDS["4 bits"], 4)
    layer.update(1, 6)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.ours.crop(-1)
    with pytest.raises(ValueError, match="minus the number"):
        layer.ours.crop(3)


def codes(layer: QuantisedLayer) -> list[Tensor]:
    transform = layer.kv.transform
    own = [] if transform is None else [id(tensor) for tensor in transform.tensors()]
    return [tensor for tensor in layer.tensors() if id(tensor) not in own]


@pytest.mark.parametrize("kv", KINDS.values(), ids=KINDS)
def test_codes_do_not_depend_on_the_split_and_are_never_made_again(kv):
    keys, values = drawn(2, HEADS, 20, KEY_DIM), drawn(2, HEADS, 20, VALUE_DIM, seed=1)
    whole = QuantisedLayer(kv)
    whole.update(keys, values)
    for split in ([1] * 20, [7, 1, 1, 11], [19, 1]):
        layer, seen = QuantisedLayer(kv), 0
        for k, v in zip(keys.split(split, dim=2), values.split(split, dim=2), strict=True):
            before = codes(layer)
            layer.update(k, v)
            assert all(torch.equal(old, new[:, :, :seen]) for old, new in zip(before, codes(layer), strict=False))
            seen += k.shape[2]
        for found, expected in zip(codes(layer), codes(whole), strict=True):
            assert torch.equal(found, expected)


def test_memory_report_counts_what_lives():
    first_kv, second_kv = LayerKV(MinMax(4), MinMax(2), RandomHadamard("0 0")), LayerKV(Plain(), MinMax(3))
    cache = KVCache(layers=[QuantisedLayer(first_kv), QuantisedLayer(second_kv, window=4), DynamicLayer()])
    assert (cache.memory_report().bytes, cache.memory_report().bits_per_element) == (0, 0)
    for _ in range(2):
        for index in range(3):
            keys, values = drawn(2, HEADS, 5, KEY_DIM).bfloat16(), drawn(2, HEADS, 5, VALUE_DIM).bfloat16()
            cache.update(keys, values, index)
    report = cache.memory_report()
    rows = 2 * HEADS * 10
    first = rows * (KEY_DIM // 2 + 3) + rows * (4 * 1 + 3) + KEY_DIM  # 4-bit keys; 2 bits * 16 in a word; signs
    second = 2 * HEADS * 3 * (KEY_DIM * 2 + 2 * 4 + 3)  # 3 tokens are left; 48 bits of values in two words
    third = rows * (KEY_DIM + VALUE_DIM) * 2
    assert report.bytes == first + second + third
    assert report.elements == (2 * rows + 2 * HEADS * 3) * (KEY_DIM + VALUE_DIM)
    assert report.times_smaller == pytest.approx(16 / report.bits_per_element)
    assert report.describe()["bytes"] == report.bytes
    dynamic = DynamicCache()
    dynamic.update(drawn(1, 1, 2, 4), drawn(1, 1, 2, 4), 0)
    assert memory_report(dynamic).bits_per_element == 32
    cache.reset()
    assert memory_report(KVCache(layers=cache.layers[:2])).bytes == KEY_DIM


def test_head_dim_128_at_4_bits_takes_4_19_bits():
    layer = QuantisedLayer(LayerKV(MinMax(4), MinMax(4)))
    layer.update(drawn(1, 2, 50, 128), drawn(1, 2, 50, 128))
    assert KVCache(layers=[layer]).memory_report().bits_per_element == pytest.approx(67 * 8 / 128)


@pytest.mark.parametrize("transform", [RandomHadamard("0 0"), KeyMatrix(drawn(KEY_DIM, KEY_DIM, seed=3).double())])
def test_scores_stay_what_they_were_when_nothing_is_rounded(transform):
    queries = drawn(2, HEADS, 5, KEY_DIM, seed=8, dtype=torch.float64)
    keys = drawn(2, HEADS, 9, KEY_DIM, dtype=torch.float64)
    layer = QuantisedLayer(LayerKV(Plain(), Plain(), transform))
    found, _ = layer.update(keys, keys)
    torch.testing.assert_close(queries @ found.mT, queries @ keys.mT, rtol=1e-10, atol=1e-10)
    (kept, *_) = layer.tensors()
    torch.testing.assert_close(kept, transform.apply(keys))
    assert not torch.allclose(kept, keys, atol=0.1)


def test_a_matrix_in_front_of_the_rotary_embedding_does_not_cancel():
    """Why it stands behind: it would have to commute with a rotation that depends on the position."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16)
    positions = torch.arange(3, 9)[None]
    states = drawn(1, 2, 6, 16, dtype=torch.float64)
    cos, sin = (t.double() for t in LlamaRotaryEmbedding(config)(states, positions))
    transform = RandomHadamard("0 0")
    behind = transform.undo(transform.apply(apply_rotary_pos_emb(states, states, cos, sin)[1]))
    before = transform.undo(apply_rotary_pos_emb(states, transform.apply(states), cos, sin)[1])
    expected = apply_rotary_pos_emb(states, states, cos, sin)[1]
    torch.testing.assert_close(behind, expected, rtol=1e-6, atol=1e-6)
    assert (before - expected).abs().max() > 0.1


def test_rotation_of_keys_pays_where_channels_stand_out():
    keys = drawn(1, 4, 500, 64)
    keys[..., [3, 17, 40]] += torch.tensor([7.0, -6.0, 8.0])
    errors = []
    for transform in (None, RandomHadamard("0 0")):
        read, _ = LayerKV(MinMax(4), MinMax(4), transform).round(keys, keys)
        errors.append(float((read - keys).norm()))
    assert errors[1] < 0.75 * errors[0]


def test_signs_depend_on_the_seed_alone():
    keys = drawn(1, 1, 2, 64)
    again, other = (RandomHadamard(seed).apply(keys) for seed in ("0 1", "0 2"))
    assert torch.equal(RandomHadamard("0 1").apply(keys), again)
    assert not torch.allclose(again, other)
    (signs,) = _used("0 1", 8)
    assert signs.tolist() == [1, 1, -1, -1, -1, 1, -1, 1]  # checkpoints rely on them


def _used(seed: str, size: int) -> list[Tensor]:
    transform = RandomHadamard(seed)
    transform.apply(torch.zeros(1, size))
    return list(transform.tensors())


def test_gradients_pass_a_learned_matrix_and_learned_clips():
    matrix = torch.eye(8, dtype=torch.float64) + 0.1 * drawn(8, 8, dtype=torch.float64)
    matrix.requires_grad_()
    high = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    kv = LayerKV(MinMax(4, high=high), MinMax(4), KeyMatrix(matrix))
    keys, _ = kv.round(drawn(1, 2, 5, 8, dtype=torch.float64), drawn(1, 2, 5, 8, dtype=torch.float64))
    keys.square().sum().backward()
    for gradient in (matrix.grad, high.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3
