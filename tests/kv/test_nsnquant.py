"""NSNQuant's arithmetic: against the steps written out for one chunk, and by what it has to leave unchanged."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kv import nsn_encode
from quantkit.kv.codebooks import Codebook, load
from quantkit.kv.nsn_encode import Chunks, Coder, matrix, mean_group, pack_nibbles, unpack_nibbles
from quantkit.kv.nsnquant import NSN, Config, layer_kv
from quantkit.kv.rope import Rope

WINDOW = 64
KINDS = {
    "1 bit e8": (load("e8", 1), 4),
    "1 bit kmeans": (load("kmeans", 1), 8),
    "2 bits": (load("magnitudes", 2), 4),
    "2 bits, mean of 8": (load("magnitudes", 2), 8),
}


def rope_for(width: int, interleaved: bool = False, share: float = 1.0) -> Rope:
    dim = int(width * share)
    return Rope(tuple(5e5 ** (-2 * j / dim) for j in range(dim // 2)), interleaved)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(read: Tensor, states: Tensor) -> float:
    return ((read - states).double().square().sum() / states.double().square().sum()).item()


def method(book: Codebook | str = "2 bits", **settings: Any) -> NSN:
    """Without a sink; nothing newer than an incomplete chunk is left as it is."""
    if isinstance(book, str):
        book, mean_bits = KINDS[book]
        settings = {"mean_bits": mean_bits} | settings
    return NSN(Coder(book, **({"window": WINDOW, "mean_bits": 4} | settings)), 0, 0)


def rounded(numbers: list[float], bits: int) -> list[float]:
    """On a grid from the least to the largest number, its ends as float16 holds them."""
    low, high = min(numbers), max(numbers)
    step, low = (float(torch.tensor(v, dtype=torch.float16)) for v in (max((high - low) / (2**bits - 1), 1e-5), low))
    return [min(max(round((v - low) / step), 0), 2**bits - 1) * step + low for v in numbers]


def one_chunk(states: Tensor, coder: Coder, start: int) -> Tensor:
    """What one chunk [W, d], float64, reads back as; one token at a time where it matters."""
    width = states.shape[1]
    slots = [start + t for t in range(len(states))]
    hadamard = matrix(width, torch.float64, states.device)

    def turned(x: Tensor, undo: bool) -> Tensor:
        if coder.rope is None:
            return x
        move = coder.rope.unrotate if undo else coder.rope.rotate
        return torch.stack([move(row[None], torch.tensor([p]))[0] for row, p in zip(x, slots, strict=True)])

    first = torch.tensor(rounded([(row.norm() / width**0.5).item() for row in states], 4), dtype=torch.float64)
    x = turned(states / first[:, None], undo=True)
    group = mean_group(width)
    mean = [rounded(part.tolist(), coder.mean_bits) for part in x.mean(0).split(group)]
    shift = torch.tensor(list(itertools.chain(*mean)), dtype=torch.float64)
    x = x - shift
    second = x.norm(dim=1) / width**0.5
    y = turned(x / second[:, None], undo=False) @ hadamard.T
    vectors = coder.codebook.vectors.double()
    parts = y.view(-1, 1, 8)
    near = (parts.abs() if coder.codebook.bits == 2 else parts).sub(vectors).square().sum(-1).argmin(-1)
    q = vectors[near] * (parts.squeeze(1).sign() if coder.codebook.bits == 2 else 1)
    q = q.view(y.shape)
    gain = (second * y.square().sum(1) / (y * q).sum(1)).half().double()
    return first[:, None] * ((gain[:, None] * q) @ hadamard + turned(shift.expand_as(x), undo=False))


@pytest.mark.parametrize("rope", ["none", "halves", "interleaved", "partial"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [24, 80])
def test_equals_the_steps_written_out(kind, rope, width):
    turns = {
        "none": None,
        "halves": rope_for(width),
        "interleaved": rope_for(width, True),
        "partial": rope_for(width, share=0.5),
    }
    coder = replace(method(kind).coder, window=16, rope=turns[rope])
    states = normal(2, 1, 2, 16, width, seed=width, dtype=torch.float64) + 3 * normal(width, seed=2)
    starts = torch.tensor([4, 20])
    read = coder.decode(coder.encode(states, starts), starts, torch.float64)
    for row, chunk in itertools.product(range(2), range(2)):
        expected = one_chunk(states[row, 0, chunk], coder, int(starts[chunk]))
        torch.testing.assert_close(read[row, 0, chunk], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [8, 24, 40, 64, 80, 96, 112, 128, 160, 192, 256])
def test_packing_for_every_width(width):
    h = matrix(width, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(h @ h.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    codes = torch.randint(0, 16, (3, 5, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    coder = method("2 bits").coder
    chunks = coder.encode(normal(1, 2, 3, WINDOW, width), torch.arange(3) * WINDOW)
    parts = chunks.tensors()
    assert sum(part.nbytes for part in parts.values()) == 2 * 3 * coder.chunk_bytes(width)
    expected = {
        "codes": (torch.uint8, (WINDOW, width // 8)),
        "signs": (torch.uint8, (WINDOW, width // 8)),
        "gain": (torch.float16, (WINDOW,)),
        "norm_codes": (torch.uint8, (WINDOW // 2,)),
        "norm_range": (torch.float16, (2,)),
        "mean_codes": (torch.uint8, (width // 2,)),
        "mean_range": (torch.float16, (width // mean_group(width), 2)),
    }
    assert {name: (part.dtype, tuple(part.shape[3:])) for name, part in parts.items()} == expected


@pytest.mark.parametrize(
    ("width", "bits", "expected"), [(128, 1, 1.238), (128, 2, 2.238), (64, 1, 1.398), (80, 2, 2.35)]
)
def test_bits_per_element(width, bits, expected):
    coder = method("2 bits" if bits == 2 else "1 bit e8").coder
    assert 8 * coder.chunk_bytes(width) / (WINDOW * width) == pytest.approx(expected, abs=6e-4)


class Exact:
    """In the place of a codebook: what is read back is what was searched for."""

    bits = 1

    def search(self, numbers: Tensor) -> tuple[Tensor, None]:
        self.numbers = numbers
        return torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // 8, dtype=torch.uint8), None

    def look_up(self, indices: Tensor, signs: None, dtype: torch.dtype) -> Tensor:
        return self.numbers.to(dtype)


@pytest.mark.parametrize("rope", [None, rope_for(64)])
def test_without_codewords_the_loop_is_closed(rope):
    """What 4 bits lose of norms and means is handed on, so only the gain's float16 is left."""
    coder: Any = Coder(Exact(), WINDOW, 4, rope=rope)  # type: ignore[arg-type]
    states = normal(1, 2, 3, WINDOW, 64) * normal(WINDOW, 1, seed=3).exp() + 4 * normal(64, seed=4)
    starts = torch.arange(3) * WINDOW
    read = coder.decode(coder.encode(states, starts), starts, torch.float32)
    assert ((read - states).norm(dim=-1) / states.norm(dim=-1)).max() < 1e-3


@pytest.mark.parametrize("gain", ["unbiased", "mse"])
def test_what_the_error_is_orthogonal_to(gain):
    coder = method("1 bit kmeans", gain=gain).coder
    y = normal(5, 3, 128, dtype=torch.float64)
    q = coder.codebook.look_up(*coder.codebook.search(y), torch.float64)
    left = y - coder._gain(y, q)[..., None] * q
    other = y if gain == "unbiased" else q
    assert (left * other).sum(-1).abs().max() < 1e-10 * 128


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("1 bit kmeans", 128, 0.462), ("1 bit e8", 128, 0.458), ("2 bits", 128, 0.101),
        ("1 bit kmeans", 64, 0.459), ("1 bit e8", 64, 0.454), ("2 bits", 64, 0.099),
        ("1 bit kmeans", 256, 0.465), ("1 bit e8", 256, 0.460), ("2 bits", 256, 0.102),
    ],
)  # fmt: skip
def test_the_error_on_normal_tokens(kind, width, expected):
    states = normal(1, 1, 2**19 // width, width, seed=width)
    read = method(kind).round(states)
    assert error(read, states) == pytest.approx(expected, rel=0.02)
    if width == 128:
        cosine = torch.cosine_similarity(read, states, dim=-1).mean()
        assert cosine >= (0.951 if kind == "2 bits" else 0.824)


def like_keys(width: int = 128, tokens: int = 1024) -> tuple[Tensor, Rope]:
    """Behind the rotary embedding: channels that hang together, of unequal size, six with a bias."""
    mixing = torch.eye(width) + normal(width, 16, seed=1) @ normal(16, width, seed=2) / width**0.5
    sizes = (0.7 * normal(width, seed=3)).exp()
    bias = torch.zeros(width)
    bias[torch.randperm(width, generator=torch.Generator().manual_seed(4))[:6]] = 2 * torch.tensor(
        [5.0, -6, 7, -8, 9, -5]
    )
    plain = (normal(1, 2, tokens, width, seed=5) @ mixing) * sizes + bias
    rope = rope_for(width)
    return rope.rotate(plain * (0.25 * normal(1, 2, tokens, 1, seed=6)).exp(), torch.arange(tokens)), rope


@pytest.mark.parametrize("kind", ["1 bit e8", "2 bits"])
def test_what_each_step_is_good_for(kind, monkeypatch):
    keys, rope = like_keys()
    full, post, none = (
        error(method(kind, **settings).round(keys), keys) for settings in ({"rope": rope}, {}, {"shift": False})
    )
    assert full < post < none
    assert none > 1.2 * full
    shrunk = error(method(kind, rope=rope, gain="mse").round(keys), keys)
    assert shrunk < 0.95 * full
    monkeypatch.setattr(nsn_encode, "matrix", lambda size, dtype, device: torch.eye(size, dtype=dtype))
    assert error(method(kind, rope=rope).round(keys), keys) > 1.1 * full  # eight channels are not normally distributed


def test_a_bias_of_all_keys_costs_little():
    """Absolute error: without the shift the codewords have to carry the bias."""
    rope, slots = rope_for(128), torch.arange(1024)
    plain = normal(1, 2, 1024, 128)

    def absolute(size: float, **settings: Any) -> float:
        keys = rope.rotate(plain + size * normal(128, seed=9), slots)
        return (method("2 bits", **settings).round(keys) - keys).square().mean().item()

    with_4, with_8 = absolute(0, rope=rope, mean_bits=4), absolute(0, rope=rope, mean_bits=8)
    for size, at_4, grown in ((2, 1.04, 4), (5, 1.2, 18)):
        assert absolute(size, rope=rope, mean_bits=4) < at_4 * with_4
        assert absolute(size, rope=rope, mean_bits=8) < 1.01 * with_8
        assert absolute(size, shift=False) > grown * with_4


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_of_two_leaves_the_codes_as_they_are(kind):
    coder = replace(method(kind).coder, rope=rope_for(64))
    states, starts = normal(1, 2, 2, WINDOW, 64), torch.tensor([0, WINDOW])
    found, scaled = coder.encode(states, starts), coder.encode(16 * states, starts)
    for name in ("codes", "signs", "gain", "norm_codes", "mean_codes", "mean_range"):
        part = getattr(found, name)
        assert part is None or torch.equal(part, getattr(scaled, name)), name
    assert torch.equal(16 * found.norm_range, scaled.norm_range)


def test_tokens_may_be_of_any_length():
    states = normal(1, 2, 1024, 128)
    lengths = 0.5 + 1.5 * torch.rand(1, 2, 1024, 1, generator=torch.Generator().manual_seed(1))
    nsn = method("2 bits")

    def mean_error(x: Tensor) -> float:
        return ((nsn.round(x) - x).square().sum(-1) / x.square().sum(-1)).mean().item()

    assert mean_error(lengths * states) == pytest.approx(mean_error(states), rel=0.01)


@pytest.mark.parametrize(("interleaved", "share"), [(False, 1.0), (True, 1.0), (False, 0.25), (True, 0.5)])
def test_positions_may_be_off_by_a_constant(interleaved, share):
    """A chunk is in the frame of its positions; norms and codes do not see a rotation of all of it. Only the rounding
    of the mean does."""
    rope = rope_for(128, interleaved, share)
    plain = normal(1, 2, 1024, 128) + normal(128, seed=7)
    found = []
    for offset in (0, 7, 1000):
        keys = rope.rotate(plain.double(), torch.arange(1024) + offset).float()
        found.append(error(method("2 bits", rope=rope, mean_bits=8).round(keys), keys))
    assert found[1] == pytest.approx(found[0], rel=0.01)
    assert found[2] == pytest.approx(found[0], rel=0.01)
    unturned = error(method("2 bits", mean_bits=8).round(keys), keys)
    assert unturned > 1.05 * found[2]  # the rope is what makes the mean constant over a chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_tokens(kind, dtype):
    states = normal(1, 6, WINDOW, 64)
    states[0, 0] = 0
    states[0, 1, ::3] = 0
    states[0, 2] = states[0, 2, :1]
    states[0, 3, 5] *= 1000
    states[0, 3, 6] = 0
    states[0, 4] *= 1e-6
    states[0, 5] *= 2e4 if dtype == torch.float16 else 1e6  # norms that float16 does not hold
    states = (states.clamp(-65504, 65504) if dtype == torch.float16 else states).to(dtype)
    read = replace(method(kind), coder=replace(method(kind).coder, rope=rope_for(64))).round(states)
    assert read.dtype == dtype
    assert read.isfinite().all()
    assert (read[(states == 0).all(-1)] == 0).all()
    limit = 0.6 if "1 bit" in kind else 0.15
    for head in (1, 3, 5):
        assert error(read[0, head], states[0, head]) < limit
    rest = torch.arange(WINDOW) != 5
    assert error(read[0, 3][rest], states[0, 3][rest]) < 2 * limit


def test_numbers_without_bounds_stay_finite():
    states = normal(1, 1, WINDOW, 64)
    states[0, 0, 3] = 3e38
    states[0, 0, 4] = 1e-38
    assert method("2 bits").round(states).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_spoils_its_chunk_and_no_other(kind, bad):
    states = normal(2, 2, 3 * WINDOW + 5, 64)
    clean = method(kind).round(states)
    states[0, 1, WINDOW + 7, 11] = bad
    read = method(kind).round(states)
    assert read[0, 1, WINDOW : 2 * WINDOW].isnan().all()
    clean[0, 1, WINDOW : 2 * WINDOW] = read[0, 1, WINDOW : 2 * WINDOW] = 0
    assert torch.equal(read, clean)


def test_the_same_bytes_twice_and_with_more_threads():
    states, starts = normal(2, 2, 3, WINDOW, 64), torch.arange(3) * WINDOW
    coder = replace(method("2 bits").coder, rope=rope_for(64))
    threads = torch.get_num_threads()
    found: list[Chunks] = []
    try:
        for count in (1, 1, 4):
            torch.set_num_threads(count)
            found.append(coder.encode(states, starts))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, part in found[0].tensors().items():
            assert torch.equal(part, getattr(other, name)), name


def test_presets():
    safe, paper, one = Config().settled(), Config(preset="paper").settled(), Config(preset="paper", bits=1).settled()
    assert (safe.sink, safe.min_recent, safe.mean_bits_k, safe.codebook) == (4, 64, 8, "e8")
    assert (paper.sink, paper.min_recent, paper.mean_bits_k, paper.codebook) == (0, 0, 4, "kmeans")
    assert one.min_recent == Config(preset="paper", bits_v=1).settled().min_recent == 64
    assert Config(sink=0, min_recent=0, mean_bits_k=4).settled().sink == 0
    assert safe.settled() == safe == Config.model_validate(safe.model_dump())
    assert Config(bits_k=2, bits=1).describe().startswith("2-bit and 1-bit codewords of eight numbers (NSNQuant)")
    assert "the first 4 and the newest 64 tokens in full precision" in Config().describe()
    for wrong in ({"bits": 3}, {"window": 60}, {"sinks": 1}, {"preset": "fast"}, {"key_shift": "before"}):
        with pytest.raises(ValidationError):
            Config(**wrong)


def test_settings_reach_keys_and_values():
    rope = rope_for(64)
    made = layer_kv(Config(bits_k=2, bits_v=1, window=32, sink=2, gain_v="mse"), 64, 32, rope)
    keys, values = made.keys.coder, made.values.coder
    assert (keys.codebook.name, keys.mean_bits, keys.gain, keys.rope, keys.window) == (
        "magnitudes",
        8,
        "unbiased",
        rope,
        32,
    )
    assert (values.codebook.name, values.mean_bits, values.gain, values.rope) == ("e8", 4, "mse", None)
    assert (made.keys.sink, made.values.sink, made.transform) == (2, 2, None)
    for shift, expected in (("post_rope", (True, None)), ("none", (False, None))):
        keys = layer_kv(Config(key_shift=shift), 64, 64, rope).keys.coder
        assert (keys.shift, keys.rope) == expected
    assert layer_kv(Config(), 64, 64, None).keys.coder.rope is None


@pytest.mark.parametrize(
    ("keys", "values", "what"), [(20, 16, "keys of one head have 20"), (16, 4, "values .* have 4")]
)
def test_widths_that_eight_does_not_divide(keys, values, what):
    with pytest.raises(QuantkitError, match=what):
        layer_kv(Config(), keys, values, None)
    unknown = layer_kv(Config(), 0, 0, None)
    assert unknown.values.round(torch.zeros(1, 1, 2, 16)).shape == (1, 1, 2, 16)
    with pytest.raises(QuantkitError, match="of one head have 20"):
        unknown.keys.store().append(torch.zeros(1, 1, 2, 20))


def test_gradients_pass_straight_through():
    states = normal(1, 1, 100, 24).requires_grad_()
    read = method("2 bits").round(states)
    assert torch.equal(read, method("2 bits").round(states.detach()))
    weights = normal(1, 1, 100, 24, seed=1)
    (read * weights).sum().backward()
    torch.testing.assert_close(states.grad, weights)
