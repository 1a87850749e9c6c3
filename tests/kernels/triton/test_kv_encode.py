"""Chunks packed in Triton's interpreter against ``Coder.encode`` of the reference, and its float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.kernels.triton import compat, configs, kv_encode
from quantkit.kv import nsn_encode
from quantkit.kv.codebooks import Codebook, load
from quantkit.kv.nsn_encode import Chunks, Coder, mean_group, unpack_nibbles
from quantkit.kv.nsn_store import NSNStore
from quantkit.kv.rope import Rope

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
E8, KMEANS, MAGNITUDES = load("e8", 1), load("kmeans", 1), load("magnitudes", 2)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a step costs the same whatever its size: the codewords are looked through in two parts."""
    monkeypatch.setattr(kv_encode, "_BLOCK", 128)


def rope_for(width: int, interleaved: bool = False, share: float = 1.0) -> Rope:
    dim = int(width * share)
    return Rope(tuple(5e5 ** (-2 * j / dim) for j in range(dim // 2)), interleaved)


def chunks_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Like keys: channels have means, tokens lengths from 1 / 2 to 2. ``shape``: batch, heads, C, W, d."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=made) + 2 * torch.randn(shape[1], 1, 1, shape[4], generator=made)
    return (x * torch.linspace(0.5, 2, shape[3])[:, None]).to(dtype)


def packed(states: Tensor, starts: Tensor, coder: Coder) -> Chunks:
    return Chunks(**kv_encode.encode(states, starts, coder, mean_group(states.shape[-1])))


def starts_of(states: Tensor, first: int = 4) -> Tensor:
    return first + states.shape[3] * torch.arange(states.shape[2])


def error(chunks: Chunks, states: Tensor, starts: Tensor, coder: Coder) -> float:
    wanted = states.double()
    return ((coder.decode(chunks, starts, torch.float64) - wanted).square().sum() / wanted.square().sum()).item()


def check(got: Chunks, want: Chunks, share: float = 0.01) -> None:
    """The same parts; up to ``share`` of the codes and of the gains may differ, ranges by what float16 rounds."""
    assert got.tensors().keys() == want.tensors().keys()
    for name, part in want.tensors().items():
        other = getattr(got, name)
        assert (other.shape, other.dtype) == (part.shape, part.dtype), name
        if part.dtype == torch.uint8:
            # Of what is multiplied by 0 any codeword will do: all pairs of e8 are equally far from 0.
            counted = want.gain[..., None] != 0 if name == "codes" else True
            assert ((other != part) & counted).sum() <= share * part.numel(), name
        else:
            assert torch.equal(other.isnan(), part.isnan()), name
            off = (other.float() - part.float()).abs() > 1e-3 * part.float().abs() + 1e-5
            assert off.sum() <= (share * part.numel() if name == "gain" else 0), name


def cases() -> Iterator[Any]:
    """Keys and values of both presets, and everything else that can be set."""
    settings: dict[str, tuple[Codebook, dict[str, Any]]] = {
        "safe keys": (MAGNITUDES, {"mean_bits": 8, "rope": rope_for(64)}),
        "paper keys": (MAGNITUDES, {"mean_bits": 4, "rope": rope_for(64)}),
        "values": (MAGNITUDES, {"mean_bits": 4}),
        "safe keys, 1 bit": (E8, {"mean_bits": 8, "rope": rope_for(64)}),
        "paper keys, 1 bit": (KMEANS, {"mean_bits": 4, "rope": rope_for(64)}),
        "safe values, 1 bit": (E8, {"mean_bits": 4}),
        "paper values, 1 bit": (KMEANS, {"mean_bits": 4}),
        "least error": (MAGNITUDES, {"mean_bits": 8, "gain": "mse"}),
        "least error, 1 bit": (E8, {"mean_bits": 8, "gain": "mse", "rope": rope_for(64)}),
        "no shift": (MAGNITUDES, {"mean_bits": 8, "shift": False, "rope": rope_for(64)}),
    }
    for name, (book, options) in settings.items():
        yield pytest.param(Coder(book, **({"window": 64} | options)), id=name)


@pytest.mark.parametrize("coder", list(cases()))
def test_parts_of_the_reference(interpreted_kv_encode, coder):
    states = chunks_of(1, 2, 1, 64, 64)
    starts = starts_of(states)
    got, want = packed(states, starts, coder), coder.encode(states, starts)
    check(got, want)
    exact = error(coder.encode(states.double(), starts), states, starts, coder)
    assert abs(error(got, states, starts, coder) - exact) < 1e-3 * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("book", [MAGNITUDES, E8], ids=["2 bits", "1 bit"])
def test_dtypes(interpreted_kv_encode, book, dtype):
    states = chunks_of(1, 1, 1, 64, 128, dtype=dtype)
    coder, starts = Coder(book, 64, 8, rope=rope_for(128)), starts_of(states)
    got, want = packed(states, starts, coder), coder.encode(states, starts)
    check(got, want)
    reference = error(want, states, starts, coder)
    assert abs(error(got, states, starts, coder) - reference) < 1e-3 * reference


@pytest.mark.parametrize("width", [8, 24, 40, 80, 96, 112, 256])
@pytest.mark.parametrize("book", [MAGNITUDES, E8], ids=["2 bits", "1 bit"])
def test_widths(interpreted_kv_encode, book, width):
    """Sizes that fill no tile, and behind each token numbers that must not be read; ``mse`` counts codewords."""
    padded = torch.full((1, 1, 1, 16, width + 8), 1e4)
    padded[..., :width] = chunks_of(1, 1, 1, 16, width)
    coder = Coder(book, 16, 4, "mse", rope=rope_for(width))
    states, starts = padded[..., :width], torch.tensor([3])
    check(packed(states, starts, coder), coder.encode(states, starts))


@pytest.mark.parametrize("window", [16, 24, 40, 104])
@pytest.mark.parametrize("mean_bits", [4, 8])
def test_windows(interpreted_kv_encode, window, mean_bits):
    coder, states = Coder(MAGNITUDES, window, mean_bits, rope=rope_for(32)), chunks_of(1, 1, 2, window, 32)
    starts = starts_of(states)
    check(packed(states, starts, coder), coder.encode(states, starts))


@pytest.mark.parametrize(("batch", "heads", "count"), [(1, 1, 0), (1, 1, 1), (2, 1, 3), (1, 2, 2), (0, 2, 1)])
def test_each_chunk_has_its_place(interpreted_kv_encode, batch, heads, count):
    coder, states = Coder(MAGNITUDES, 16, 8, rope=rope_for(16)), chunks_of(batch, heads, count, 16, 16)
    starts = starts_of(states)
    got = packed(states, starts, coder)
    assert got.codes.shape == (batch, heads, count, 16, 2)
    if states.numel():
        check(got, coder.encode(states, starts))


def test_strides(interpreted_kv_encode):
    """A part of a longer tail, heads behind tokens, and channels that are not next to each other."""
    coder = Coder(KMEANS, 16, 4)
    tail = chunks_of(2, 2, 1, 40, 32)[:, :, 0]
    for states in (
        tail[:1, :, 3:35, :16].unflatten(2, (2, 16)),
        tail.transpose(1, 2).contiguous().transpose(1, 2)[:, :1, :16, 16:].unflatten(2, (1, 16)),
        tail[1:, 1:, :32, ::2].unflatten(2, (2, 16)),
    ):
        starts = starts_of(states)
        check(packed(states, starts, coder), coder.encode(states, starts))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("first", [0, 100_003])
def test_rotary_embeddings(interpreted_kv_encode, interleaved, share, first):
    """Tokens far behind: angles in float32 would be off by hundredths. 40 channels: pairs lie in different ranges."""
    coder = Coder(MAGNITUDES, 16, 8, rope=rope_for(40, interleaved, share))
    states = chunks_of(1, 1, 2, 16, 40)
    starts = starts_of(states, first)
    got, want = packed(states, starts, coder), coder.encode(states, starts)
    check(got, want)
    # Were the mean another one, codes would differ, too; but of a rotation that does nothing only this would tell.
    other = replace(coder, rope=None).encode(states, starts)
    assert (other.codes != want.codes).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("book", [MAGNITUDES, E8, KMEANS], ids=["2 bits", "e8", "kmeans"])
def test_odd_tokens(interpreted_kv_encode, book, dtype):
    states = chunks_of(1, 6, 1, 16, 16)
    states[0, 0] = 0
    states[0, 1, 0, ::3] = 0
    states[0, 2] = states[0, 2, :, :1]
    states[0, 3, 0, 5] *= 1000
    states[0, 3, 0, 6] = 0
    states[0, 4] *= 1e-6
    states[0, 5] *= 2e4 if dtype == torch.float16 else 1e6  # norms that float16 does not hold
    states = (states.clamp(-65504, 65504) if dtype == torch.float16 else states).to(dtype)
    coder, starts = Coder(book, 16, 4, rope=rope_for(16)), torch.tensor([4])
    got, want = packed(states, starts, coder), coder.encode(states, starts)
    # Of equal tokens nothing is left but rounding errors, whose codes are as good as any.
    rest = [0, 1, 3, 4, 5]
    check(got.each(lambda part: part[:, rest]), want.each(lambda part: part[:, rest]))
    read = coder.decode(got, starts, dtype)
    assert read.isfinite().all()
    assert (read[(states == 0).all(-1)] == 0).all()
    reference = coder.decode(want, starts, torch.float32)[0, 2]
    difference = (coder.decode(got, starts, torch.float32)[0, 2] - reference).abs().max()
    assert difference < 1e-2 * reference.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # squares
def test_numbers_without_bounds_stay_finite(interpreted_kv_encode):
    states = chunks_of(1, 1, 1, 16, 16)
    states[..., 3, :] = 3e38
    states[..., 4, :] = 1e-38
    coder, starts = Coder(MAGNITUDES, 16, 8, rope=rope_for(16)), torch.tensor([0])
    assert coder.decode(packed(states, starts, coder), starts, torch.float32).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("book", [MAGNITUDES, E8, KMEANS], ids=["2 bits", "e8", "kmeans"])
def test_what_is_not_a_number_spoils_its_chunk_and_no_other(interpreted_kv_encode, book, bad):
    states = chunks_of(1, 2, 2, 16, 16)
    coder, starts = Coder(book, 16, 8, rope=rope_for(16)), starts_of(states)
    clean = coder.encode(states, starts)
    states[0, 1, 0, 7, 11] = bad
    got = packed(states, starts, coder)
    spoilt = coder.decode(got, starts, torch.float32).isnan().flatten(3)
    assert spoilt.all(-1).tolist() == spoilt.any(-1).tolist() == [[[False, False], [True, False]]]
    check(got, coder.encode(states, starts))
    check(got.part(1, 2), clean.part(1, 2))


@pytest.mark.parametrize("bits", [1, 2])
def test_the_lowest_of_equal_codewords(interpreted_kv_encode, monkeypatch, bits):
    """Equals among the codewords that are compared at once, and among those of another time, as a GPU takes them."""
    monkeypatch.setattr(kv_encode, "_BLOCK", 32)
    vectors = (KMEANS if bits == 1 else MAGNITUDES).vectors.clone()
    vectors[1::2] = vectors[::2]
    vectors[128:] = vectors[:128]
    states, starts = chunks_of(1, 1, 1, 16, 64), torch.tensor([0])
    coder = Coder(Codebook("twice", vectors, 1 if bits == 1 else 2), 16, 8)
    got = packed(states, starts, coder)
    assert (got.codes % 2 == 0).all()
    assert got.codes.max() < 128
    assert len(got.codes.unique()) > 20
    check(got, coder.encode(states, starts))


def test_two_codes_to_a_byte(interpreted_kv_encode):
    """The first of two in the low half; ``check`` counts bytes."""
    coder, states = Coder(MAGNITUDES, 16, 4), chunks_of(1, 1, 1, 16, 32)
    got, want = (made(states, torch.tensor([0])) for made in (lambda *x: packed(*x, coder), coder.encode))
    for name in ("norm_codes", "mean_codes"):
        assert torch.equal(unpack_nibbles(getattr(got, name)), unpack_nibbles(getattr(want, name)))
        assert len(getattr(got, name).unique()) > 3


def test_halves_go_to_even_codes(interpreted_kv_encode):
    """Norms from 0 to 15 by 1 / 2: steps of 1, and every other one in the middle of two."""
    norms = torch.arange(32).clamp(max=30) / 2
    states = norms[:, None].expand(1, 1, 1, 32, 16)
    got = packed(states, torch.tensor([0]), Coder(MAGNITUDES, 32, 4))
    assert got.norm_range.flatten().tolist() == [1, 0]
    expected = norms.round()
    expected[1] = 1  # and not 0: it is there
    assert torch.equal(unpack_nibbles(got.norm_codes).flatten().float(), expected)


def test_operator_has_shapes_without_data_and_passes_opcheck(interpreted_kv_encode):
    states, device = chunks_of(1, 1, 2, 16, 16), torch.device("cpu")
    rope = rope_for(16)
    angles = (*rope.table(torch.arange(16), torch.float32), *rope.table(torch.tensor([0, 16]), torch.float32))
    searched = (MAGNITUDES.on(device), kv_encode._half(MAGNITUDES, device))
    arguments = (states, kv_encode._signs(16, device), *searched, *angles, False, 2, 4, 16, False)
    torch.library.opcheck(torch.ops.quantkit.nsn_encode.default, arguments)


def test_a_store_takes_it(interpreted_kv_encode, monkeypatch):
    """Where nothing speaks against it; what is read back is what the reference would have stored."""
    coder = Coder(MAGNITUDES, 16, 8, rope=rope_for(32))
    states = chunks_of(1, 2, 1, 70, 32)[:, :, 0]
    expected = NSNStore(coder, 4, 8).append(states)
    taken = []
    launch = kv_encode.encode
    monkeypatch.setattr(nsn_encode.kv_encode, "refuses", lambda states, coder: None)
    monkeypatch.setattr(nsn_encode.kv_encode, "encode", lambda x, *rest: taken.append(x.shape) or launch(x, *rest))
    store = NSNStore(coder, 4, 8)
    for part in states.split([30, 1, 39], dim=2):
        read = store.append(part)
    assert taken == [(1, 2, 1, 16, 32), (1, 2, 2, 16, 32)]
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("width", "dtype", "device", "reason"),
    [
        (64, torch.float16, "cpu", "for GPUs, not cpu"),
        (64, torch.float64, "cuda", "for keys and values of 16 or 32 bits, not float64"),
        (160, torch.float16, "cuda", "for heads of up to 128 numbers and of 256, not 160"),
        (104, torch.float16, "cuda", None),
        (64, torch.bfloat16, "cuda", "for sm_80 and later, gfx90a, gfx942 and gfx950, not sm_75"),
        (256, torch.bfloat16, "cuda", None),
    ],
)
def test_says_what_it_does_not_take(monkeypatch, width, dtype, device, reason):
    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kind = "sm_75" if reason and "sm_75" in reason else "sm_90"
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device(kind, 132))

    class States:
        pass

    states: Any = States()
    states.device, states.dtype, states.shape = torch.device(device), dtype, (1, 1, 1, 64, width)
    assert kv_encode.refuses(states, Coder(MAGNITUDES, 64, 4)) == reason
