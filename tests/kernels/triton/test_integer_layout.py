import itertools

import pytest
import torch
from handmade import layer_format
from random_layers import random_layer
from torch import Tensor

from quantkit.kernels.triton import integer, integer_kernels, integer_layout
from quantkit.kernels.triton.integer_layout import IntegerWeight
from quantkit.layers.quant_linear import QuantLinear

SCHEMES = ["W8A8", "W8ZA8", "W8ZA8G32", "W8A8ZG128", "W4A8", "W4ZA8Z", "W4A4G64", "W4ZA8ZG96", "W2ZA8ZG32",
           "W4A8Z", "W2SA8Z", "W5ZA8ZG64", "W6SA6Z", "W6ZA6Z", "W7ZA8",
           "W3A8", "W3SA8Z", "W3SA3G64", "W3ZA8ZG96"]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 100), (130, 257), (128, 512)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_comes_back_as_it_was_stored(scheme, rows, columns):
    layer = random_layer(scheme, rows, columns, bias=False, dtype=torch.bfloat16)
    stored = layer._buffers[layer.weight_name].clone()
    packed = integer.pack(layer)
    assert packed is not None
    layer._buffers[layer.weight_name] = None  # nothing may be read from it
    back = integer.restore(packed, layer)
    assert back.dtype == stored.dtype
    assert torch.equal(back, stored)


def operands(weight: IntegerWeight) -> Tensor:
    """[rows, columns] int64, what meets the input; column by column, as the layout is described."""
    blocks, rows, plane = weight.tiles.shape
    width, columns = weight.width, integer_layout.block_columns(weight.width, plane)
    found = torch.zeros(rows, blocks * columns, dtype=torch.int64)
    for column in range(blocks * columns):
        block, within = divmod(column, columns)
        byte = weight.tiles[block, :, within % plane].long() & 0xFF
        field = (byte >> (width * (within // plane))) & (2**width - 1)
        if width == 8:
            found[:, column] = field.to(torch.uint8).view(torch.int8)
        else:
            found[:, column] = field if weight.zero_point else (field - 2 ** (width - 1)) * 2 ** (8 - width)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_operands_scales_and_sums_are_those_of_the_weight(scheme):
    rows, columns = 5, 200
    layer = random_layer(scheme, rows, columns, bias=False, dtype=torch.float16)
    layer_64 = QuantLinear(columns, rows, False, layer.format, torch.float64)
    layer_64.load_state_dict(layer.state_dict())
    want = layer_64.dequantize()
    weight = integer_layout.from_layer(layer)
    q = operands(weight)
    steps = weight.steps.t()
    zero = (steps & 0xFF) - 128 * (weight.width == 8) if weight.zero_point else torch.zeros_like(steps)
    scale = ((steps & ~0xFF) if weight.zero_point else steps).view(torch.float32).double()
    group = q.shape[1] if weight.group_size == -1 else weight.group_size
    spread = torch.arange(q.shape[1]) // group
    value = (q - zero[:, spread]) * scale[:, spread]
    assert torch.equal(value[:rows, :columns], want)
    assert not weight.tiles[:, rows:].any()
    assert not weight.steps[rows:].numel() or not weight.steps[:, rows:].any()
    assert (weight.sums is None) == bool(layer.format.activations.symmetric)
    if weight.sums is not None:
        assert not weight.sums[rows:].any()
        if weight.group_size == -1:
            assert torch.equal(weight.sums[:rows], (q - zero)[:rows, :columns].sum(dim=1).int())
        else:
            torch.testing.assert_close(weight.sums[:rows], want.sum(dim=1).float(), rtol=1e-6, atol=1e-6)


def test_takes_as_much_memory_as_the_codes():
    for scheme, bits in (
        ("W8A8", 8),
        ("W4A8G128", 4),
        ("W4ZA8G32", 4),
        ("W2ZA8", 2),
        ("W6A6", 8),
        ("W3A8", 4),
        ("W3SA3", 4),
    ):
        weight = integer_layout.from_layer(random_layer(scheme, 128, 512, bias=False, dtype=torch.float16))
        assert weight.tiles.nbytes == 128 * 512 * bits // 8


@pytest.mark.parametrize(
    ("width", "group_size", "plane"),
    [(8, -1, 128), (8, 256, 128), (8, 64, 64), (8, 96, 32), (4, -1, 64), (4, 128, 64), (4, 32, 32), (2, 192, 64)],
)
def test_planes_divide_groups(width, group_size, plane):
    assert integer_layout.plane_of(width, group_size) == plane


def test_one_group_of_all_columns_is_one_scale_per_row():
    weight = integer_layout.from_layer(random_layer("W4A8ZG128", 3, 128, bias=False, dtype=torch.float16))
    assert weight.group_size == -1
    assert weight.steps.shape[0] == 1
    assert weight.sums is not None
    assert weight.sums.dtype == torch.int32


def test_what_it_could_not_give_back_is_not_packed():
    layer = random_layer("W4A8", 40, 33, bias=False, dtype=torch.float16)
    assert integer.pack(layer) is not None
    layer.weight_packed[7, -1] |= 1 << 30  # behind the last code of a row
    assert integer.pack(layer) is None


def test_scales_that_leave_no_room_for_a_zero_point_are_not_packed():
    for scheme, fits in (("W4ZA8", False), ("W8ZA8", False), ("W4A8Z", True), ("W6ZA8", True)):
        layer = random_layer(scheme, 4, 64, bias=False, dtype=torch.float32)
        assert integer.pack(layer) is not None
        layer.weight_scale.add_(1e-7)
        assert (integer.pack(layer) is not None) == fits, scheme


@pytest.mark.parametrize(("scheme", "supported"), [("W4A8G16", False), ("W3A8", True), ("WNF4A8G32", False),
                                                   ("W5A8G96", True)])  # fmt: skip
def test_what_can_be_laid_out(scheme, supported):
    assert integer_layout.supports(layer_format(scheme)) == supported


def test_groups_have_no_bound_unless_they_are_as_long():
    assert integer_layout.most_columns(layer_format("W8A8G128")) is None
    assert integer_layout.most_columns(layer_format("W8A8G131072")) == 131071


def run(ptx: str, registers: dict[str, Tensor]) -> Tensor:
    """$0 after ``ptx``, on registers of 32 bits in int64."""

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in ptx.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not operands or name == ".reg":
            continue
        target, *sources = [operand.strip() for operand in operands.split(",")]
        a, *others = [value(source) for source in sources]
        match name:
            case "mov.b32":
                result = a
            case "shr.u32":
                result = a >> others[0]
            case "shl.b32":
                result = a << others[0]
            case "sub.u32":
                result = a - others[0]
            case "xor.b32":
                result = a ^ others[0]
            case "lop3.b32":  # the table by its definition: a is 0xF0, b 0xCC, c 0xAA
                result = torch.zeros_like(a)
                for bit, row in itertools.product(range(32), range(8)):
                    if int(others[2]) >> row & 1:
                        inputs = zip((a, others[0], others[1]), (row >> 2 & 1, row >> 1 & 1, row & 1), strict=True)
                        hit = torch.ones_like(a, dtype=torch.bool)
                        for register, wanted in inputs:
                            hit = hit & ((register >> bit & 1) == wanted)
                        result = result | hit.long() << bit
            case _:
                raise AssertionError(name)
        registers[target] = result & 0xFFFFFFFF
    return registers["$0"]


def packed_bytes(values: Tensor) -> Tensor:
    """[n, 4] of bytes -> [n] registers."""
    return ((values & 0xFF) << torch.tensor([0, 8, 16, 24])).sum(dim=1)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(("width", "field"), [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (8, 0)])
def test_ptx_makes_the_operands_of_the_layout(width, field, zero_point):
    """All bytes and all zero points, with other bytes beside them; the interpreter never sees this form."""
    pytest.importorskip("triton")
    tile = torch.arange(256).repeat(4, 1).t().contiguous()
    tile[:, 1:] = torch.randint(256, (256, 3))
    for zero in range(2**width if zero_point and width < 8 else 1):
        ptx = integer_kernels.operand_ptx(width, field, zero_point)
        registers = {"$1": packed_bytes(tile), "$2": torch.tensor(zero * 0x01010101)}
        code = tile >> (width * field) & (2**width - 1)
        want = code if width == 8 else code - zero if zero_point else (code - 2 ** (width - 1)) * 2 ** (8 - width)
        assert torch.equal(run(ptx, registers), packed_bytes(want))
