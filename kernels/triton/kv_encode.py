"""Chunks of keys and values to codes (NSNQuant) on GPUs through Triton: ``Coder.encode`` of ``kv/nsn_encode.py``.

One program per chunk and head, so a prompt fills the device and a chunk that is due while tokens are generated takes
one short launch. Sums are taken in another order than the reference does, so now and then a number in the middle of two
codes gets the other one. A launch does not wait for the device; codebook, Hadamard matrix and angles are copied to it
by the first call, which therefore has to come before a graph is captured.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from quantkit.kernels import hadamard
from quantkit.kernels.library import define
from quantkit.kernels.triton import compat, weight_only
from quantkit.kv.codebooks import E8_SCALE, WIDTH, Codebook

if TYPE_CHECKING:
    from quantkit.kv.nsn_encode import Coder
    from quantkit.kv.rope import Rope

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_ORDER = 128
"""Of the matrix that a program multiplies by; heads twice as long, of two halves, take another step."""
WARPS = 8
_MEASURED, _CODED = 4096, 2048
"""Numbers in hand at once while a chunk is measured, and while it is coded."""
_BLOCK = 32
"""Codewords that the 256 vectors of eight numbers among the latter are compared with at once. Twice as many take as
many instructions for each score and half again the registers, on gfx942 more than there are."""


def refuses(states: Tensor, coder: Coder) -> str | None:
    """Why ``encode`` does not take ``states``; None if it does."""
    if states.device.type != "cuda":
        return f"for GPUs, not {states.device.type}"
    if not compat.AVAILABLE:
        return compat.MISSING
    if states.dtype not in DTYPES:
        return f"for keys and values of 16 or 32 bits, not {str(states.dtype).removeprefix('torch.')}"
    return unsuited(coder, states.shape[-1]) or weight_only.incapable(states.device)


def unsuited(coder: Coder, head_dim: int) -> str | None:
    """The part of ``refuses`` that depends on sizes alone."""
    if head_dim > LARGEST_ORDER and head_dim != 2 * LARGEST_ORDER:
        return f"for heads of up to {LARGEST_ORDER} numbers and of {2 * LARGEST_ORDER}, not {head_dim}"
    if hadamard.split(head_dim).kind == "hartley":
        return f"{head_dim} numbers have no Hadamard matrix"
    if coder.window % 2:
        return f"for an even number of tokens in a chunk, not {coder.window}"
    return None


def encode(states: Tensor, starts: Tensor, coder: Coder, mean_group: int) -> dict[str, Tensor]:
    """The parts of ``Chunks`` by name; ``states`` [batch, heads, C, W, d] and ``starts`` [C] as for ``Coder.encode``.

    Args:
        mean_group: channels of the mean that share a range.
    """
    book, device = coder.codebook, states.device
    searched = (None, None) if book.name == "e8" else (book.on(device), _half(book, device))
    angles: tuple[Tensor | None, ...] = (None,) * 4
    interleaved = False
    if coder.shift and coder.rope is not None:
        angles = (*_angles(coder.rope, coder.window, device), *coder.rope.table(starts, torch.float32))
        interleaved = coder.rope.interleaved
    parts = _op(
        states, _signs(min(states.shape[-1], LARGEST_ORDER), device), *searched, *angles, interleaved, book.bits,
        coder.mean_bits if coder.shift else 0, mean_group, coder.gain == "mse",
    )  # fmt: skip
    made = zip(Parts._fields, parts, strict=True)
    absent = set() if book.bits == 2 else {"signs"}
    absent |= set() if coder.shift else {"mean_codes", "mean_range"}
    return {name: part for name, part in made if name not in absent}


class Parts(NamedTuple):
    """Tensors of ``Chunks`` as the operator returns them; of those that are not there, the last dimension is 0."""

    codes: Tensor
    signs: Tensor
    gain: Tensor
    norm_codes: Tensor
    norm_range: Tensor
    mean_codes: Tensor
    mean_range: Tensor

    def pointers(self) -> tuple[Tensor | None, ...]:
        return tuple(part if part.shape[-1] else None for part in self)


def empty(states: Tensor, bits: int, mean_bits: int, mean_group: int) -> Parts:
    """Room for the chunks of ``states`` [batch, heads, C, W, d]."""
    *outer, window, dim = states.shape
    eighths, groups = dim // WIDTH, dim // mean_group if mean_bits else 0

    def room(dtype: torch.dtype, *sizes: int) -> Tensor:
        return states.new_empty(*outer, *sizes, dtype=dtype)

    return Parts(
        room(torch.uint8, window, eighths),
        room(torch.uint8, window, eighths if bits == 2 else 0),
        room(torch.float16, window),
        room(torch.uint8, window // 2),
        room(torch.float16, 2),
        room(torch.uint8, dim * mean_bits // 8),
        room(torch.float16, groups, 2 if mean_bits else 0),
    )


class Tile(NamedTuple):
    """How a program takes a chunk; names as in ``kv_encode_kernels.encode_kernel``."""

    D: int
    ROWS: int
    TOKENS: int
    BLOCK: int


def tile(window: int, dim: int) -> Tile:
    """For chunks of ``window`` tokens of ``dim`` numbers."""
    filled = max(16, 1 << (dim - 1).bit_length())  # matrix units take no fewer
    tokens = 1 << (window - 1).bit_length()
    measured = _MEASURED if dim == filled else _MEASURED // 2  # masks take registers
    return Tile(filled, min(tokens, measured // filled), min(tokens, _CODED // filled), _BLOCK)


def constants(
    states: Tensor, pairs: int, interleaved: bool, bits: int, mean_bits: int, mean_group: int, mse: bool
) -> dict[str, Any]:
    """What the kernel is compiled for; ``pairs``: of channels that are rotated."""
    window, dim = states.shape[-2:]
    return {
        "W": window,
        "DIM": dim,
        "MEAN_BITS": mean_bits,
        "GROUP": mean_group,
        "PAIRS": pairs,
        "INTERLEAVED": interleaved,
        "MAGNITUDES": bits == 2,
        "MSE": mse,
        "E8_SCALE": E8_SCALE,
    } | tile(window, dim)._asdict()


def _run(
    states: Tensor, matrix: Tensor, codewords: Tensor | None, half: Tensor | None, token_cos: Tensor | None,
    token_sin: Tensor | None, start_cos: Tensor | None, start_sin: Tensor | None, interleaved: bool, bits: int,
    mean_bits: int, mean_group: int, mse: bool,
) -> Parts:  # fmt: skip
    """The operator ``quantkit::nsn_encode``: tensors as ``encode_kernel`` has them."""
    made = empty(states, bits, mean_bits, mean_group)
    if states.numel() == 0:
        return made
    x = states if states.stride(-1) == 1 else states.contiguous()
    pairs = 0 if token_cos is None else token_cos.shape[1]
    with weight_only.on_device(x):
        _kernels().encode_kernel[(x.shape[:3].numel(),)](
            x, matrix, codewords, half, token_cos, token_sin, start_cos, start_sin, *made.pointers(),
            x.shape[1], x.shape[2], *x.stride()[:4],
            **constants(x, pairs, interleaved, bits, mean_bits, mean_group, mse),
            num_warps=WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return made


@lru_cache(maxsize=32)
def _half(book: Codebook, device: torch.device) -> Tensor:
    """float32 [256]: half the squared length of each codeword."""
    with torch.inference_mode(False):
        return book.on(device).float().square().sum(-1) / 2


@lru_cache(maxsize=64)
def _signs(order: int, device: torch.device) -> Tensor:
    """float16 [order, order], +-1: x @ it / sqrt(order) is H x for every row of x."""
    with torch.inference_mode(False):
        return hadamard.multiply(torch.eye(order, dtype=torch.float64)).to(device, torch.float16)


@lru_cache(maxsize=64)
def _angles(rope: Rope, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions 0 to ``window`` - 1, both float32 [window, pairs]."""
    with torch.inference_mode(False):
        cos, sin = rope.table(torch.arange(window, device=device), torch.float32)
        return cos.contiguous(), sin.contiguous()


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.kv_encode_kernels")


def _shapes_only(
    states: Tensor, matrix: Tensor, codewords: Tensor | None, half: Tensor | None, token_cos: Tensor | None,
    token_sin: Tensor | None, start_cos: Tensor | None, start_sin: Tensor | None, interleaved: bool, bits: int,
    mean_bits: int, mean_group: int, mse: bool,
) -> Parts:  # fmt: skip
    return empty(states, bits, mean_bits, mean_group)


_op = define(
    "nsn_encode(Tensor states, Tensor matrix, Tensor? codewords, Tensor? half, Tensor? token_cos, Tensor? token_sin, "
    "Tensor? start_cos, Tensor? start_sin, bool interleaved, int bits, int mean_bits, int mean_group, bool mse) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _shapes_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
