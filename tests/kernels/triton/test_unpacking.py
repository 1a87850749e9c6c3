"""The PTX of ``weight_only_kernels.unpack_ptx`` run by hand, instruction by instruction, on every code and zero point.

It runs on no machine without an NVIDIA GPU, and the interpreter takes the other branch; so that both agree bit for bit
is shown here, by the few instructions it uses.
"""

from __future__ import annotations

import functools
import operator
import re
import struct

import pytest
import torch
from random_layers import random_layer
from torch import Tensor

from quantkit.formats.quantized import NF4_LEVELS
from quantkit.kernels.triton import layout
from quantkit.kernels.triton import weight_only_kernels as kernels

FLOAT = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def pair(low: Tensor, high: Tensor) -> Tensor:
    """Two 16-bit tensors -> int64 registers."""
    return (low.view(torch.int16).long() & 0xFFFF) | (high.view(torch.int16).long() & 0xFFFF) << 16


def halves(register: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The two numbers of a register, in float64, which holds sums and products of two of them exactly."""
    return [(register >> shift).to(torch.int16).view(dtype).double() for shift in (0, 16)]


def float32(register: Tensor) -> Tensor:
    return register.to(torch.int32).view(torch.float32)


def run(ptx: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers after ``ptx``: $0, ..."""

    def value(name: str) -> Tensor:
        if re.match(r"0f", name):
            return torch.tensor(struct.unpack(">I", bytes.fromhex(name[2:]))[0])
        return torch.as_tensor(registers[name] if name in registers else int(name, 0))

    for line in ptx.strip("{} ").split(";"):
        if not line.strip() or line.split()[0] == ".reg":
            continue
        name, operands = line.strip().split(maxsplit=1)
        target, *sources = [operand.strip() for operand in operands.split(",")]
        a, *others = [value(source) for source in sources]
        match name:
            case "mov.b32":
                result = a
            case "shr.u32":
                result = a >> others[0]
            case "shl.b32":
                result = (a << others[0]) & 0xFFFFFFFF
            case "and.b32":
                result = a & others[0]
            case "lop3.b32":
                inputs = a, others[0], others[1]
                terms = [
                    functools.reduce(operator.and_, [x if row >> (2 - i) & 1 else ~x for i, x in enumerate(inputs)])
                    for row in range(8)
                    if int(others[2]) >> row & 1
                ]
                result = functools.reduce(operator.or_, terms) & 0xFFFFFFFF
            case "prmt.b32":
                result = torch.zeros((), dtype=torch.long)
                for place in range(4):
                    choice = others[1] >> 4 * place
                    byte = torch.where(choice & 4 > 0, others[0] >> 8 * (choice & 3), a >> 8 * (choice & 3)) & 0xFF
                    sign = torch.where(byte & 0x80 > 0, 0xFF, 0)
                    result = result | torch.where(choice & 8 > 0, sign, byte) << 8 * place
            case "add.rn.f32":
                result = (float32(a) + float32(others[0])).view(torch.int32).long() & 0xFFFFFFFF
            case "cvt.rn.bf16x2.f32":
                result = pair(float32(others[0]).bfloat16(), float32(a).bfloat16())
            case "add.rn.f16x2":
                sums = zip(halves(a, torch.float16), halves(others[0], torch.float16), strict=True)
                result = pair(*[(p + q).half() for p, q in sums])
            case "mul.rn.f16x2":
                products = zip(halves(a, torch.float16), halves(others[0], torch.float16), strict=True)
                result = pair(*[(p * q).half() for p, q in products])
            case "fma.rn.bf16x2":
                terms = zip(*[halves(t, torch.bfloat16) for t in (a, *others)], strict=True)
                result = pair(*[(p * q + r).bfloat16() for p, q, r in terms])
            case _:
                raise AssertionError(name)
        registers[target] = result
    return {name: torch.as_tensor(register) for name, register in registers.items()}


@pytest.mark.parametrize("dtype", FLOAT, ids=list(FLOAT.values()))
@pytest.mark.parametrize("scheme", ["W8SA16GC", "W8ZA16GC", "W4SA16GC", "W4ZA16GC", "W3SA16GC", "W3ZA16GC", "W2SA16GC",
                                    "W2ZA16GC"])  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True], ids=["codes", "scaled"])
def test_equals_the_stored_weight_bit_for_bit(scheme, dtype, scaled):
    pytest.importorskip("triton")
    bits = int(scheme[1])
    columns, rows = layout.block_columns(bits), 256
    layer = random_layer(scheme, rows, columns, bias=False, dtype=dtype)
    planar = layout.from_layer(layer)
    if not scaled:
        layer.weight_scale.fill_(1)
    want = layer.dequantize().view(rows, -1, layout.PLANE)  # [rows, fields, 32]
    words = planar.words[0]
    third = words if planar.high is None else planar.high[0].to(torch.int16)
    steps = planar.steps[0, :, None]
    zero, scale = steps & 0xFF, (steps & ~0xFF).view(torch.float32).to(dtype).expand(rows, 16)
    bf16 = dtype == torch.bfloat16
    for field in range(want.shape[1]):
        if bits == 8 and bf16:
            offset = (128 - zero).bfloat16()
        else:
            power = kernels.negative_power(bits, field, bf16)
            offset = ((zero << kernels.zero_shift(bits, field, bf16)) | power).to(torch.int16)
            least = torch.tensor(power, dtype=torch.int16).view(dtype)
            assert torch.equal(offset.view(dtype).float(), least.float() - zero)
        offset = offset.expand(rows, 16)
        registers = {
            "$1": pair(words[:, ::2], words[:, 1::2]),
            "$2": pair(third[:, ::2], third[:, 1::2]),
            "$3": pair(offset, offset),
            "$4": pair(scale, scale),
        }
        got = run(kernels.unpack_ptx(bits, field, bf16, not layer.format.weights.symmetric, scaled), registers)["$0"]
        assert torch.equal(torch.stack(halves(got, dtype), -1).flatten(1).to(dtype), want[:, field])


@pytest.mark.parametrize("dtype", FLOAT, ids=list(FLOAT.values()))
def test_levels_are_looked_up_bit_for_bit(dtype):
    pytest.importorskip("triton")
    layer = random_layer("WNF4A16GC", 256, 128, bias=False, dtype=dtype)
    words, codes = (planar := layout.from_layer(layer)).words[0], layout.codes(planar, 0, 256).long()
    bf16 = dtype == torch.bfloat16
    got = run(kernels.nf4_ptx(bf16), {"$4": pair(words[:, ::2], words[:, 1::2])})
    scale = layer.weight_scale.expand(256, 16)
    for field, want in enumerate(NF4_LEVELS.to(dtype)[codes].view(256, 4, layout.PLANE).unbind(1)):
        plane = got[f"${field}"]
        assert torch.equal(torch.stack(halves(plane, dtype), -1).flatten(1).to(dtype), want)
        scaled = run(kernels.scale_ptx(bf16), {"$1": plane, "$2": pair(scale, scale)})["$0"]
        weight = layer.dequantize()[:, 32 * field : 32 * field + 32]
        assert torch.equal(torch.stack(halves(scaled, dtype), -1).flatten(1).to(dtype), weight)
