"""Attention of one query token over packed NSNQuant keys and values on GPUs, through Triton.

What ``kv/packed_attention.py`` computes with the readers of ``kv/nsn_attention.py``; formula and layout are theirs.
Codes are turned into codewords in registers, so nothing of the size of the keys is written or read in 16 bits. A launch
neither allocates an unknown size nor waits for the device; programs are put together in a fixed order, so a repeated
call gives the same bits.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from quantkit.kernels.library import define
from quantkit.kernels.triton import compat, configs, weight_only
from quantkit.kv.codebooks import WIDTH
from quantkit.kv.nsn_encode import matrix, mean_group

if TYPE_CHECKING:
    from quantkit.kv.nsn_store import View
    from quantkit.kv.rope import Rope

DTYPES = (torch.float16, torch.bfloat16)
WINDOWS = (16, 32, 64, 128)
"""Tokens of a chunk: a tile of the matrix instruction."""
MOST_SHARED = 16
"""Queries of one head of the keys."""
PLAIN_TOKENS = 64
"""Of those held as they came, in a program."""
MERGED, MERGED_SPLITS = 64, 16
"""Columns of a program that puts others together, and how many of them it has in hand."""
_PROGRAMS = 4
"""For each processor, as long as there are chunks for them."""
_SMALL_TILE = 64 * 128
"""Numbers of a chunk that 4 warps have registers for."""
_LEAST_STARTS = 64
"""Chunks of the shortest table of angles."""


class Side(NamedTuple):
    """Keys or values, as the kernel is given them: ``Chunks``, and the rest of a ``View``."""

    codes: Tensor | None
    """None: nothing is packed, and so for the six that follow."""
    signs: Tensor | None
    gain: Tensor | None
    norm_codes: Tensor | None
    norm_range: Tensor | None
    mean_codes: Tensor | None
    mean_range: Tensor | None
    sink: Tensor
    tail: Tensor
    book: Tensor
    """[256, 8] half"""
    hadamard: Tensor
    """H, float32 [head_dim, head_dim]"""

    @property
    def width(self) -> int:
        """head_dim"""
        return self.tail.shape[-1]

    @property
    def chunks(self) -> int:
        """Held."""
        return 0 if self.codes is None else self.codes.shape[2]

    @property
    def mean_bits(self) -> int:
        return 0 if self.mean_codes is None else self.mean_codes.shape[-1] * 8 // self.width

    @property
    def room(self) -> int:
        """Chunks from the beginning of a row, one head of one sequence, to that of the next."""
        return 0 if self.codes is None else _in_rows(self.codes) or 0

    def pointers(self) -> tuple[Tensor | None, ...]:
        """What the kernel reads, in its order."""
        book = self.book if self.signs is None else self.book.view(torch.int32)
        return *self[:7], self.sink.contiguous(), self.tail.contiguous(), book


def refuses(query: Tensor, keys: View, values: View) -> str | None:
    """Why ``attend`` does not take these; None if it does."""
    if not _on_gpu(query):
        return f"for GPUs, not {query.device.type}"
    if not compat.AVAILABLE:
        return compat.MISSING
    if query.shape[2] != 1:
        return f"for one query, not {query.shape[2]}"
    if query.dtype not in DTYPES:
        return f"for half and bfloat16 models, not {str(query.dtype).removeprefix('torch.')}"
    parts = (keys.sink, keys.tail, values.sink, values.tail)
    if any(part.dtype != query.dtype or part.device != query.device for part in parts):
        return "keys, values and queries differ in their dtype or their device"
    if keys.coder.window not in WINDOWS:
        return f"for chunks of {', '.join(map(str, WINDOWS))} tokens, not {keys.coder.window}"
    if _places(keys) != _places(values):
        return "keys are packed at other places than values"
    shared = query.shape[1] // keys.tail.shape[1]
    if shared > MOST_SHARED:
        return f"for up to {MOST_SHARED} queries of a head, not {shared}"
    width = max(part.shape[-1] for part in parts)
    reason = weight_only.incapable(query.device)
    if reason is None and width > (most := most_channels(configs.device_of(query.device).kind, keys.coder.window)):
        return f"for up to {most} channels of a head, not {width}"
    return reason


def most_channels(kind: str, window: int) -> int:
    """Of a head, for chunks of ``window`` tokens on a device class of ``configs``: what there are registers for. The
    matrix instructions of Hopper read the angles within a chunk from shared memory."""
    return 256 if configs.nearest(kind) == "sm_90" and window <= 64 else 128


def attend(
    query: Tensor, keys: View, values: View, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention over all that ``keys`` and ``values`` hold; arguments as for ``packed_attention.attend``.

    Args:
        query: [batch, query_heads, 1, head_dim].

    Returns:
        [batch, query_heads, 1, head_dim of the values] in the dtype of ``query``.
    """
    waves = starts = None
    rope, window, first = keys.coder.rope, keys.coder.window, 0
    if rope is not None and keys.coder.shift and keys.chunks is not None:
        first, offset = divmod(keys.start, window)
        count = max(_LEAST_STARTS, 1 << (first + keys.chunks.count - 1).bit_length())
        waves = _waves(rope, window, query.device)
        starts = _starts(rope, offset, window, count, query.device)
    interleaved = rope is not None and rope.interleaved
    result: Tensor = _op(
        query, mask, scaling, softcap, [*_side(keys)], [*_side(values)], waves, starts, first, window, interleaved
    )
    return result


def _on_gpu(query: Tensor) -> bool:
    return query.is_cuda


def _places(view: View) -> tuple[int, int, int, int]:
    """Where in ``view`` which tokens are."""
    return view.sink.shape[2], view.coder.window, 0 if view.chunks is None else view.chunks.count, view.tail.shape[2]


def _side(view: View) -> Side:
    device, held = view.tail.device, {} if view.chunks is None else view.chunks.tensors()
    rows = {name: _in_rows(part) for name, part in held.items()}
    if len(set(rows.values())) > 1 or None in rows.values():
        held = {name: part.contiguous() for name, part in held.items()}
    parts: dict[str, Any] = {name: held.get(name) for name in Side._fields[:7]}
    hadamard = matrix(view.tail.shape[-1], torch.float32, device)
    return Side(**parts, sink=view.sink, tail=view.tail, book=view.coder.codebook.on(device), hadamard=hadamard)


def _in_rows(part: Tensor) -> int | None:
    """How many chunks lie between the beginnings of two heads of ``part`` [batch, heads, C, ...], of the same sequence
    or at the end of one and the beginning of the next; None: not always as many."""
    (batch, heads), strides = part.shape[:2], part.stride()
    inner = part[0, 0, 0].numel()
    room = (strides[1] if heads > 1 else strides[0] if batch > 1 else 0) // inner
    usual = part[0, 0].is_contiguous() and (batch == 1 or strides[0] == heads * room * inner)
    return room if usual else None


@lru_cache(maxsize=32)
def _waves(rope: Rope, window: int, device: torch.device) -> Tensor:
    """float32 [2, window, rotary_dim / 2]: cosines and sines of the angles from a chunk's first token to each."""
    with torch.inference_mode(False):
        return torch.stack(rope.table(torch.arange(window, device=device), torch.float32))


@lru_cache(maxsize=32)
def _starts(rope: Rope, offset: int, window: int, count: int, device: torch.device) -> Tensor:
    """float32 [count, rotary_dim]: cosines, behind them sines, at the first tokens of chunks."""
    with torch.inference_mode(False):
        places = offset + window * torch.arange(count, device=device)
        return torch.cat(rope.table(places, torch.float32), dim=-1)


@lru_cache(maxsize=8)
def _flips(device: torch.device) -> Tensor:
    """int32 [256, 4], or half [256, 8]: the sign bit is set where bit j of the byte is not, else nothing is."""
    with torch.inference_mode(False):
        negative = torch.arange(256, device=device)[:, None] >> torch.arange(WIDTH, device=device) & 1 ^ 1
        return (negative * -(2**15)).to(torch.int16).view(torch.int32)


def share(rows: int, chunks: int, processors: int) -> int:
    """How many of the ``chunks`` of each of ``rows`` rows a program takes."""
    wanted = max(1, -(-_PROGRAMS * processors // rows))
    return max(1, -(-chunks // wanted))


def constants(
    shared: int, window: int, widths: tuple[int, int], mean_bits: tuple[int, int], rotary: int, interleaved: bool,
    wide: bool,
) -> dict[str, Any]:  # fmt: skip
    """What ``split_kernel`` is compiled for, but for dtypes, the mask and the cap.

    Args:
        shared: queries of a head of the keys.
        widths, mean_bits: of keys and of values.
        rotary: channels that are rotated.
        wide: the matrix instruction takes at least 16 queries, not 8.
    """
    return {
        "GROUP": shared,
        "QUERIES": 8 if shared <= 8 and not wide else 16,
        "W": window,
        "DK": widths[0],
        "DV": widths[1],
        "BLOCK_K": _power(widths[0]),
        "BLOCK_V": _power(widths[1]),
        "KEY_GROUP": mean_group(widths[0]),
        "VALUE_GROUP": mean_group(widths[1]),
        "KEY_BITS": mean_bits[0],
        "VALUE_BITS": mean_bits[1],
        "ROTARY": rotary,
        "BLOCK_R": _power(rotary // 2),
        "INTERLEAVED": interleaved,
        "BLOCK_T": PLAIN_TOKENS,
    }


def merge_constants(shared: int, width: int, coded: bool) -> dict[str, Any]:
    """What ``merge_kernel`` is compiled for: values of ``width`` channels; whether there are chunks."""
    return {
        "GROUP": shared, "DV": width, "BLOCK_V": _power(width), "COLUMNS": MERGED, "SPLITS": MERGED_SPLITS,
        "CODED": coded,
    }  # fmt: skip


def warps(width: int, window: int) -> int:
    """Of a program, for chunks [``window``, ``width``]."""
    return 4 if _power(width) * window <= _SMALL_TILE else 8


def stages(width: int, window: int, kind: str) -> int:
    """Chunks on their way to a program at once, on a device class of ``configs``. With more than one the codewords of
    each lie in shared memory, of which only Hopper has enough for two programs of a processor."""
    return 3 if configs.nearest(kind) == "sm_90" and _power(width) * window <= _SMALL_TILE else 1


def _power(size: int) -> int:
    """``size`` filled up to a power of two that matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def _run(
    query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, keys: list[Tensor | None],
    values: list[Tensor | None], waves: Tensor | None, starts: Tensor | None, first: int, window: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """The operator ``quantkit::kv_attention``: query and mask as for ``attend``, keys and values as ``Side``."""
    key, value = Side._make(keys), Side._make(values)
    (batch, query_heads, _, width), heads = query.shape, key.tail.shape[1]
    rows, shared = batch * heads, query_heads // heads
    flat = query.reshape(-1, width)
    device = configs.device_of(query.device)
    taken = share(rows, key.chunks, device.processors)
    coded = -(-key.chunks // taken)
    splits = coded + -(-(key.sink.shape[2] + key.tail.shape[2]) // PLAIN_TOKENS)
    sums = query.new_empty(rows, splits, 2, shared, value.width, dtype=torch.float32)
    state = query.new_empty(rows, splits, 2, shared, dtype=torch.float32)
    # The interpreter has no bfloat16, and cuts off instead of rounding to it.
    exact = not query.is_cuda and query.dtype != torch.float16
    out = query.new_empty(batch, query_heads, 1, value.width, dtype=torch.float32 if exact else query.dtype)
    rotary = 0 if waves is None else 2 * waves.shape[-1]
    sizes = (width, value.width), (key.mean_bits, value.mean_bits), rotary, interleaved
    widest = max(width, value.width)
    depth = stages(widest, window, device.kind)
    options = {"num_warps": warps(widest, window), "enable_fp_fusion": True}
    with weight_only.on_device(query):
        kernels = _kernels()
        kernels.split_kernel[(rows, splits)](
            flat,
            flat.float() @ key.hadamard.mT if key.chunks else flat,
            None if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
            *key.pointers(),
            *value.pointers(),
            None if key.signs is None and value.signs is None else _flips(query.device),
            waves,
            starts,
            sums,
            state,
            scaling,
            softcap or 0.0,
            heads,
            key.chunks,
            taken,
            coded,
            key.sink.shape[2],
            key.tail.shape[2],
            key.room,
            value.room,
            first,
            *_mask_strides(mask),
            CODED=key.chunks > 0,
            CAPPED=softcap is not None,
            ADDED=mask is not None and mask.dtype != torch.bool,
            BY_HEAD=mask is not None and mask.shape[1] > 1,
            DTYPE=weight_only.triton_dtype(torch.float32 if exact else torch.float16),
            PLAIN=weight_only.triton_dtype(torch.float32 if exact else query.dtype),
            STAGES=depth,
            num_stages=depth,
            **constants(shared, window, *sizes, wide=torch.version.hip is not None),
            **options,
        )
        kernels.merge_kernel[(rows * shared, -(-value.width // MERGED))](
            sums,
            state,
            value.hadamard,
            out,
            splits,
            coded,
            **merge_constants(shared, value.width, key.chunks > 0),
            **options,
        )
    return out.to(query.dtype)


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Numbers from one sequence, one head and one token to the next."""
    if mask is None:
        return 0, 0, 1
    batch, heads, _, tokens = mask.stride()
    return batch if mask.shape[0] > 1 else 0, heads if mask.shape[1] > 1 else 0, tokens


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton: not before the first launch."""
    return importlib.import_module("quantkit.kernels.triton.kv_attention_kernels")


def _shape_only(
    query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, keys: list[Tensor | None],
    values: list[Tensor | None], waves: Tensor | None, starts: Tensor | None, first: int, window: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], Side._make(values).tail.shape[-1])


_op = define(
    "kv_attention(Tensor query, Tensor? mask, float scaling, float? softcap, Tensor?[] keys, Tensor?[] values, "
    "Tensor? waves, Tensor? starts, int first, int window, bool interleaved) -> Tensor",
    _run,
    _shape_only,
    ("CUDA", "CPU"),  # CPU: Triton's interpreter
)
