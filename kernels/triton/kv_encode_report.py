"""The kernel that packs keys and values compiled for GPUs that are not there, with the sizes of models.

    python -m quantkit.kernels.triton.kv_encode_report [sm_80 sm_90 gfx942]

prints registers, spills, shared memory and instructions of a thread; exits with 1 if one spills, asks for more shared
memory than there is or does not use matrix units.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch

from quantkit.kernels.triton import activation_report, ahead, kv_encode, kv_encode_kernels
from quantkit.kernels.triton.activation_report import Variant
from quantkit.kv.nsn_encode import mean_group

PRODUCTS = {"sm_80": r"HMMA\.16816\.F32", "sm_90": r"H(G|)MMA\S*\.F32", "gfx942": r"v_mfma_f32_(16x16x16|32x32x8)"}
"""What multiplies half numbers."""


def encoding(
    head_dim: int, dtype: str, bits: int = 2, e8: bool = False, keys: bool = True, mean_bits: int = 4,
    window: int = 64, interleaved: bool = False, mse: bool = False,
) -> Variant:  # fmt: skip
    """``encode_kernel``; ``keys``: with a rotary embedding of all channels."""
    table = ("*fp32", keys and mean_bits > 0)
    pointers = {
        "x_ptr": (f"*{dtype}", True),
        "matrix_ptr": ("*fp16", True),
        "codewords_ptr": ("*fp16", not e8),
        "half_ptr": ("*fp32", not e8),
        "token_cos_ptr": table,
        "token_sin_ptr": table,
        "start_cos_ptr": table,
        "start_sin_ptr": table,
        "codes_ptr": ("*u8", True),
        "signs_ptr": ("*u8", bits == 2),
        "gain_ptr": ("*fp16", True),
        "norm_codes_ptr": ("*u8", True),
        "norm_range_ptr": ("*fp16", True),
        "mean_codes_ptr": ("*u8", mean_bits > 0),
        "mean_range_ptr": ("*fp16", mean_bits > 0),
    }
    pairs = head_dim // 2 if table[1] else 0
    constants = kv_encode.constants(
        torch.empty(1, 1, 1, window, head_dim, device="meta"), pairs, interleaved, bits, mean_bits,
        mean_group(head_dim), mse,
    )  # fmt: skip
    name = f"{bits} bit{' e8' * e8} {'keys' if keys else 'values'} {window} x {head_dim} m{mean_bits} {dtype}"
    name += " interleaved" * interleaved + " mse" * mse
    strides = ("stride_batch", "stride_head", "stride_chunk", "stride_token")
    made = activation_report.made(name, kv_encode_kernels.encode_kernel, pointers, constants, strides, kv_encode.WARPS)
    return made._replace(arguments=made.arguments | {"heads": "i32", "count": "i32"})


def variants() -> Iterator[Variant]:
    """Keys and values of both presets, and the forms that differ most from them."""
    for head_dim in (64, 128, 256):
        yield encoding(head_dim, "bf16", mean_bits=8)
        yield encoding(head_dim, "bf16", 1, True, mean_bits=8)
        yield encoding(head_dim, "bf16", keys=False)
    yield encoding(128, "bf16", 1, True, keys=False)
    yield encoding(128, "fp16", 1)
    yield encoding(80, "fp16", mean_bits=8)
    yield encoding(96, "bf16", 1, True, mean_bits=8)
    yield encoding(128, "fp32", mean_bits=8)
    yield encoding(128, "bf16", mean_bits=8, window=128, interleaved=True, mse=True)
    yield encoding(128, "bf16", mean_bits=0, window=24)


def main(targets: list[str]) -> int:
    """Print the table; 1 if a variant does not fit its target."""
    return ahead.print_lines(_lines(targets or ahead.TARGETS))


def _lines(targets: Iterable[str]) -> Iterator[ahead.Line]:
    for target in targets:
        for variant in variants():
            built = activation_report.build(variant, target)
            products, total = built.count(PRODUCTS[target]), built.instructions.total()
            more = {"warps": str(variant.warps), "instructions": str(total), "products": str(products)}
            yield ahead.Line(target, variant.name, built, more, meant=products > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
