"""Attention over packed keys and values compiled for GPUs that are not there, with the sizes of models.

    python -m quantkit.kernels.triton.kv_attention_report [sm_80 sm_90 gfx942]

prints registers, spills, shared memory, and the instructions that a number of a key and one of a value take together;
exits with 1 if something spills, asks for more shared memory than there is or does not use matrix units. What H200 has
time for while it would read the two in 16 bits: 29.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from quantkit.kernels.triton import activation_report, ahead, compat, kv_attention, kv_attention_kernels
from quantkit.kernels.triton.activation_report import Variant
from quantkit.kernels.triton.ahead import Built

PRODUCTS = {"sm_80": r"HMMA\.16816\.F32", "sm_90": r"H(G|)MMA\S*\.F32", "gfx942": r"v_mfma_f32_(16x16x16|32x32x8)"}
"""What multiplies half numbers."""
LOADS = {
    "sm_80": r"LDG\S*\.128|LDGSTS\S*\.128",
    "sm_90": r"LDG\S*\.128|LDGSTS\S*\.128",
    "gfx942": r"global_load_dwordx4",
}
"""Of 16 bytes, as a codeword has."""


def splitting(
    target: str, dtype: str = "bf16", bits: int = 2, shared: int = 4, window: int = 64, width: int = 128,
    rotary: int | None = None, interleaved: bool = False, mean_bits: int = 8, mask: str = "", by_head: bool = False,
    capped: bool = False, coded: bool = True,
) -> Variant:  # fmt: skip
    """``split_kernel``.

    Args:
        shared: queries of a head of the keys.
        rotary: rotated channels; None: all.
        mean_bits: of keys; 0: no shift.
        mask: its type for Triton; empty: there is none.
        coded: there are chunks.
    """
    tl = compat.module("language")
    rotary = (width if rotary is None else rotary) if coded and mean_bits else 0
    pointers = {"q_ptr": (f"*{dtype}", True), "turned_ptr": ("*fp32", True), "mask_ptr": (mask, bool(mask))}
    for side, shift in (("key", mean_bits > 0), ("value", True)):
        pointers |= {
            f"{side}_codes_ptr": ("*u8", coded),
            f"{side}_signs_ptr": ("*u8", coded and bits == 2),
            f"{side}_gain_ptr": ("*fp16", coded),
            f"{side}_norm_codes_ptr": ("*u8", coded),
            f"{side}_norm_range_ptr": ("*fp16", coded),
            f"{side}_mean_codes_ptr": ("*u8", coded and shift),
            f"{side}_mean_range_ptr": ("*fp16", coded and shift),
            f"{side}_sink_ptr": (f"*{dtype}", True),
            f"{side}_tail_ptr": (f"*{dtype}", True),
            f"{side}_book_ptr": ("*i32" if bits == 2 else "*fp16", True),
        }
    pointers |= {
        "flips_ptr": ("*i32", coded and bits == 2),
        "waves_ptr": ("*fp32", rotary > 0),
        "starts_ptr": ("*fp32", rotary > 0),
        "sums_ptr": ("*fp32", True),
        "state_ptr": ("*fp32", True),
    }
    constants = kv_attention.constants(
        shared, window, (width, width), (mean_bits, 4), rotary, interleaved, target.startswith("gfx")
    )
    depth = kv_attention.stages(width, window, target)
    constants |= {
        "CODED": coded,
        "CAPPED": capped,
        "ADDED": mask not in ("", "*u8"),
        "BY_HEAD": by_head,
        "DTYPE": tl.float16,
        "PLAIN": tl.bfloat16 if dtype == "bf16" else tl.float16,
        "STAGES": depth,
        "mask_token": 1,
    }
    name = f"{bits} bit {dtype}, {window} x {width}, {shared} shared, r{rotary} m{mean_bits}" if coded else "no chunks"
    name += f"{' interleaved' * interleaved} {mask}{' by head' * by_head}{' cap' * capped}"
    made = activation_report.made(
        name.rstrip(),
        kv_attention_kernels.split_kernel,
        pointers,
        constants,
        (),
        kv_attention.warps(width, window),
        depth,
    )
    numbers = dict.fromkeys(_NUMBERS, "i32") | {"scaling": "fp32", "softcap": "fp32"}
    return made._replace(arguments=made.arguments | numbers)


_NUMBERS = ("heads", "chunks", "taken", "coded", "sinks", "tails", "key_room", "value_room", "first", "mask_batch",
            "mask_head")  # fmt: skip


def merging(width: int, window: int = 64, dtype: str = "bf16", shared: int = 4, coded: bool = True) -> Variant:
    """``merge_kernel``."""
    pointers = {
        "sums_ptr": ("*fp32", True),
        "state_ptr": ("*fp32", True),
        "hadamard_ptr": ("*fp32", True),
        "out_ptr": (f"*{dtype}", True),
    }
    constants = kv_attention.merge_constants(shared, width, coded)
    made = activation_report.made(
        f"merge {width} {dtype}",
        kv_attention_kernels.merge_kernel,
        pointers,
        constants,
        (),
        kv_attention.warps(width, window),
    )
    return made._replace(arguments=made.arguments | {"splits": "i32", "coded": "i32"})


def variants(target: str) -> Iterator[Variant]:
    """Both kernels, in the forms that differ most."""
    widest = kv_attention.most_channels(target, 64)
    for width in (width for width in (64, 128, 256) if width <= widest):
        for bits in (1, 2):
            yield splitting(target, bits=bits, width=width)
        yield merging(width)
    yield splitting(target, "fp16", bits=1, shared=1, mean_bits=4)
    yield splitting(target, shared=16)
    yield splitting(target, shared=7, width=80, rotary=32)
    yield splitting(target, shared=1, width=96, rotary=0, bits=1)
    yield splitting(target, rotary=64, interleaved=True, mean_bits=4, bits=1)
    yield splitting(target, mean_bits=0, mask="*bf16", by_head=True)
    yield splitting(target, shared=2, width=widest, mask="*u8", capped=True)
    yield splitting(target, window=16, mask="*u8")
    yield splitting(target, window=128, mask="*u8")
    yield splitting(target, coded=False)


def build(variant: Variant, target: str) -> Built:
    """Compile ``variant`` as it is launched on ``target``."""
    return ahead.build(
        variant.kernel, variant.arguments, variant.constants, target, variant.warps, variant.stages, fusion=True
    )


def cost(variant: Variant, built: Built, target: str) -> float:
    """Instructions of a thread for each pair of numbers, one of a key and one of a value, of the main loop."""
    if not variant.constants.get("CODED") or "W" not in variant.constants:
        return 0.0
    threads = variant.warps * (64 if target.startswith("gfx") else 32)
    return built.loop.total() * threads / (variant.constants["W"] * variant.constants["DK"])


def main(targets: list[str]) -> int:
    """Print the table; 1 if a variant does not fit its target."""
    return ahead.print_lines(_lines(targets or ahead.TARGETS))


def _lines(targets: Iterable[str]) -> Iterator[ahead.Line]:
    for target in targets:
        for variant in variants(target):
            built = build(variant, target)
            meant = variant.kernel is kv_attention_kernels.merge_kernel or built.count(PRODUCTS[target]) > 0
            more = {"warps": str(variant.warps), "per pair": f"{cost(variant, built, target):.1f}"}
            yield ahead.Line(target, variant.name, built, more, meant)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
