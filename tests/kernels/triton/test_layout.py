import pytest
import torch
from random_layers import random_layer

from quantkit.formats.layer import LayerFormat, from_tensors
from quantkit.kernels.triton import layout
from quantkit.recipe import WeightScheme


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 100), (130, 257), (128, 512)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8ZA16G32", "W4A16G128", "W4ZA16G96", "W3ZA16G64", "W3SA16GC", "W2ZA16G32",
                                    "W2ZA16G512", "WNF4A16G64"])  # fmt: skip
def test_comes_back_as_it_was_stored(scheme, dtype, rows, columns):
    layer = random_layer(scheme, rows, columns, bias=False, dtype=dtype)
    want, _ = from_tensors(layer.state_dict(), layer.format)
    planar = layout.from_layer(layer)
    got = layout.to_quantized(planar)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)
    assert got.scale.dtype == dtype
    assert (got.zero_point is None) == (want.zero_point is None)
    if got.zero_point is not None and want.zero_point is not None:
        assert torch.equal(got.zero_point, want.zero_point)
    assert torch.equal(layout.restore(planar, layer), layer._buffers[layer.weight_name])
    assert (got.bits, got.group_size, got.levels) == (want.bits, want.group_size, want.levels)


def test_takes_as_much_memory_as_the_codes():
    for scheme, bits in (("W8A16G128", 8), ("W4A16G128", 4), ("W3ZA16G128", 3), ("W2ZA16G128", 2)):
        planar = layout.from_layer(random_layer(scheme, 128, 512, bias=False, dtype=torch.float16))
        held = planar.words.nbytes + (0 if planar.high is None else planar.high.nbytes)
        assert held == 128 * 512 * bits // 8
        assert planar.steps.nbytes == 128 * 4 * 4


def test_a_word_holds_columns_that_lie_a_plane_apart():
    """The bits themselves, for the width whose words are easy to read: 4 bits, four columns 32 apart."""
    layer = random_layer("W4A16G128", 2, 256, bias=False, dtype=torch.float16)
    codes = from_tensors(layer.state_dict(), layer.format)[0].codes.int()
    word = int(layout.from_layer(layer).words[1, 1, 7]) & 0xFFFF
    assert word == sum(int(codes[1, 128 + 32 * j + 7]) << (4 * j) for j in range(4))


@pytest.mark.parametrize(
    ("bits", "group_size", "supported"),
    [(4, 128, True), (4, -1, True), (3, 96, True), (2, 32, True), (4, 16, False), (8, 48, False), (6, 128, False)],
)
def test_what_can_be_laid_out(bits, group_size, supported):
    weights = WeightScheme(bits=bits, group_size=group_size)
    assert layout.supports(LayerFormat(weights=weights)) == supported


def test_padding_is_nothing():
    """Code 0 of scale 0: what the product reads there adds nothing whatever the zero point."""
    planar = layout.from_layer(random_layer("W4ZA16G32", 5, 100, bias=False, dtype=torch.float16))
    assert planar.words.shape == (1, 128, 32)
    assert not planar.words[:, 5:].any()
    assert not planar.steps[:, 5:].any()


def test_scales_that_fill_a_float32_are_refused():
    layer = random_layer("W4A16G32", 5, 64, bias=False, dtype=torch.float32)
    layout.from_layer(layer)
    layer.weight_scale.add_(1e-7)
    with pytest.raises(ValueError, match=r"scales of torch\.float32 do not fit"):
        layout.from_layer(layer)
