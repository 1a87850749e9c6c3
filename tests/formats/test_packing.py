import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats import packing
from quantkit.formats.packing import pack_rows, pack_zero_points, unpack_rows, unpack_zero_points, words_per_row

SHAPES = [(1, 1), (3, 7), (5, 31), (2, 32), (7, 33), (4, 104), (83, 545), (1, 4099)]  # few of them fill whole words


def slow_pack(codes: Tensor, bits: int) -> Tensor:
    """The layout bit by bit: least significant bit first, 32 bits to a word."""
    stream = (codes.long()[..., None] >> torch.arange(bits)) & 1
    stream = stream.flatten(1)
    stream = F.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    word = (stream << torch.arange(32)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def random_codes(shape: tuple[int, int], bits: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def test_four_bit_codes_fill_a_word_from_the_low_end():
    assert pack_rows(torch.arange(8, dtype=torch.uint8)[None], 4).item() == 0x76543210


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_and_round_trip(bits, shape):
    codes = random_codes(shape, bits)
    packed = pack_rows(codes, bits)
    assert packed.shape == (shape[0], words_per_row(shape[1], bits))
    assert torch.equal(packed, slow_pack(codes, bits))
    assert torch.equal(unpack_rows(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes((83, 54), bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_rows(codes, bits), helpers.pack_to_int32(signed, bits))
    assert torch.equal(pack_zero_points(codes, bits), helpers.pack_to_int32(signed, bits, packed_dim=0))


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_any_width_round_trips(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_are_independent_of_the_chunk_they_are_in(bits, monkeypatch):
    codes = random_codes((37, 50), bits)
    whole = pack_rows(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK_CODES", 170)
    assert torch.equal(pack_rows(codes, bits), whole)
    assert torch.equal(unpack_rows(whole, bits, 50), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_views_are_read_and_written_in_place(bits):
    codes = random_codes((40, 24), bits)
    assert torch.equal(pack_rows(codes.t()[:, 1:], bits), slow_pack(codes.t()[:, 1:], bits))
    packed = pack_rows(codes, bits)
    out = torch.full((40, 30), 99, dtype=torch.uint8)
    unpack_rows(packed, bits, 24, out=out[:, 3:27])
    assert torch.equal(out[:, 3:27], codes)
    assert (out[:, :3] == 99).all()
    assert (out[:, 27:] == 99).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (104, 1), (33, 5), (64, 2)])
def test_zero_points_are_packed_along_the_rows(bits, rows, groups):
    zero_points = random_codes((rows, groups), bits)
    packed = pack_zero_points(zero_points, bits)
    assert packed.shape == (words_per_row(rows, bits), groups)
    assert torch.equal(packed, slow_pack(zero_points.t().contiguous(), bits).t())
    assert torch.equal(unpack_zero_points(packed, bits, rows), zero_points)


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "message"),
    [
        ((2, 8), torch.int8, 4, r"expected a 2-D torch.uint8 tensor, got torch.int8 \(2, 8\)"),
        ((8,), torch.uint8, 4, "expected a 2-D"),
        ((2, 8), torch.uint8, 9, "bits is 9; codes have 1 to 8"),
    ],
)
def test_what_cannot_be_packed_is_refused(shape, dtype, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_rows(torch.zeros(shape, dtype=dtype), bits)


def test_a_width_that_does_not_fit_the_words_is_refused():
    with pytest.raises(ValueError, match="20 codes of 3 bits take 2 words per row, packed has 3"):
        unpack_rows(torch.zeros(1, 3, dtype=torch.int32), 3, 20)
