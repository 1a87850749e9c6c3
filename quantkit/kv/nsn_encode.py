"""NSNQuant's coding of one chunk of W tokens of one head: normalise, shift, normalise, rotate, code (section 3).

Son et al., arXiv 2505.18231. X [W, d] are the keys or values of the chunk, H is an orthonormal Hadamard matrix. A tilde
marks what is kept in few bits; each step goes on with that, so the error of one is handed to the next and coded there:

    1  n1_t = |x_t| / sqrt(d)                     4 bits, one range for the W tokens           x_t = x_t / ~n1_t
    2  keys: x_t = R(p_t)**-1 x_t                 the rotary embedding at position p_t
       m = the mean of the tokens                 4 or 8 bits, a range for each 32 channels    x_t = x_t - ~m
    3  n2_t = |x_t| / sqrt(d)                                                                  x_t = x_t / n2_t
       keys: x_t = R(p_t) x_t
    4  y_t = H x_t, q_t the codewords next to it  8 or 16 bits for each eight numbers
    5  g_t = n2_t <y_t, y_t> / <y_t, q_t>         float16; mse: n2_t <y_t, q_t> / <q_t, q_t>

    read back:    values  ~n1_t (H.T g_t q_t + ~m)        keys  ~n1_t (H.T g_t q_t + R(p_t) ~m)

So the error of g_t q_t is orthogonal to y_t, or with mse as small as can be. A range is a step s >= 1e-5 and a lowest
value z, both rounded to float16 before codes are made: code = round((w - z) / s), read back code * s + z.

A token shorter than 1e-8 is read back as zero. One number that is not finite makes its chunk of its head read back as
NaN, and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from quantkit.kernels import hadamard
from quantkit.kernels.triton import kv_encode
from quantkit.kv.codebooks import WIDTH, Codebook
from quantkit.kv.quantiser import LARGEST, wide
from quantkit.kv.rope import Rope

_SMALLEST_STEP = 1e-5
_NOTHING = 1e-8
"""Norms below it are those of zero vectors."""
_BLOCK = 2**22
"""Numbers that are coded or read at a time: 16 MiB in float32."""


@dataclass(frozen=True)
class Chunks:
    """C packed chunks of every sequence and head. All tensors are [batch, heads, C, ...]."""

    codes: Tensor
    """uint8 [.., W, d / 8]: indices of codewords; eight channels each, in their order."""
    gain: Tensor
    """float16 [.., W]: g."""
    norm_codes: Tensor
    """uint8 [.., W / 2]: codes of n1, of token 2 i in the low four bits."""
    norm_range: Tensor
    """float16 [.., 2]: step and lowest value of n1."""
    signs: Tensor | None = None
    """uint8 [.., W, d / 8], with 2 bits: bit j is set where channel j of the eight is not negative."""
    mean_codes: Tensor | None = None
    """uint8 [.., d], or [.., d / 2] with 4 bits, channel 2 i in the low four; None: no shift."""
    mean_range: Tensor | None = None
    """float16 [.., d / ``mean_group(d)``, 2]: step and lowest value of m."""

    @property
    def count(self) -> int:
        """C"""
        return self.codes.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        """By name; those that are there."""
        return {one.name: part for one in fields(self) if (part := getattr(self, one.name)) is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> Chunks:
        """With ``change`` of every tensor."""
        return Chunks(**{name: change(part) for name, part in self.tensors().items()})

    def part(self, start: int, stop: int) -> Chunks:
        """Chunks ``start`` to ``stop - 1``; views."""
        return self.each(lambda part: part[:, :, start:stop])

    @staticmethod
    def joined(parts: list[Chunks]) -> Chunks:
        """One behind the other."""
        held = [part.tensors() for part in parts]
        return parts[0] if len(parts) == 1 else Chunks(**{k: torch.cat([one[k] for one in held], 2) for k in held[0]})


@dataclass(frozen=True, eq=False)
class Coder:
    """How chunks are coded."""

    codebook: Codebook
    window: int
    """W, even."""
    mean_bits: Literal[4, 8]
    gain: Literal["unbiased", "mse"] = "unbiased"
    shift: bool = True
    """False: m is left out."""
    rope: Rope | None = None
    """None: R is the identity."""

    def chunk_bytes(self, head_dim: int) -> int:
        """Of one packed chunk of one head."""
        codes = self.window * head_dim * self.codebook.bits // 8
        mean = head_dim * self.mean_bits // 8 + 4 * (head_dim // mean_group(head_dim)) if self.shift else 0
        return codes + 2 * self.window + self.window // 2 + 4 + mean

    def encode(self, states: Tensor, starts: Tensor) -> Chunks:
        """By one kernel where ``kv_encode.refuses`` nothing.

        Args:
            states: [batch, heads, C, W, d], C >= 1, any floating dtype; 8 divides d.
            starts: int64 [C], the position of the first token of each chunk.
        """
        if kv_encode.refuses(states, self) is None:
            return Chunks(**kv_encode.encode(states, starts, self, mean_group(states.shape[-1])))
        parts = [self._encode(*part) for part in self._blocks(states, starts)]
        return Chunks.joined(parts)

    def decode(self, chunks: Chunks, starts: Tensor, dtype: torch.dtype) -> Tensor:
        """[batch, heads, C, W, d] in ``dtype``; ``starts`` as for ``encode``."""
        batch, heads, count = chunks.codes.shape[:3]
        result = torch.empty(
            batch, heads, count, self.window, WIDTH * chunks.codes.shape[-1], dtype=dtype, device=chunks.codes.device
        )
        size = self._block(result)
        for at in range(0, count, size):
            stop = min(at + size, count)
            read = self._decode(chunks.part(at, stop), starts[at:stop], wide(dtype))
            # What is read back may be a little longer than what was given, and float16 has an end.
            result[:, :, at:stop] = read.clamp(-LARGEST, LARGEST) if dtype == torch.float16 else read
        return result

    def means(self, chunks: Chunks, dtype: torch.dtype) -> Tensor:
        """~m, [batch, heads, C, d] in ``dtype``: in front of the rotary embedding where there is ``rope``."""
        assert chunks.mean_codes is not None
        assert chunks.mean_range is not None
        codes = chunks.mean_codes if self.mean_bits == 8 else unpack_nibbles(chunks.mean_codes)
        step, low = chunks.mean_range.to(dtype).split(1, dim=-1)  # [.., groups, 1]
        return (codes.unflatten(-1, (step.shape[-2], -1)).to(dtype) * step + low).flatten(-2)

    @staticmethod
    def norms(chunks: Chunks, dtype: torch.dtype) -> Tensor:
        """~n1, [batch, heads, C, W] in ``dtype``."""
        step, low = chunks.norm_range.to(dtype).split(1, dim=-1)
        return unpack_nibbles(chunks.norm_codes).to(dtype) * step + low

    def _block(self, states: Tensor) -> int:
        """Chunks that are worked on at a time, of ``states`` [batch, heads, C, W, d]."""
        return max(1, _BLOCK // max(1, states[:, :, :1].numel()))

    def _blocks(self, states: Tensor, starts: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self._block(states)
        return list(zip(states.split(size, dim=2), starts.split(size), strict=True))

    def _slots(self, starts: Tensor) -> Tensor:
        """int64 [C, W]: the position of each token."""
        return starts[:, None] + torch.arange(self.window, device=starts.device)

    def _encode(self, states: Tensor, starts: Tensor) -> Chunks:
        x = states.to(wide(states.dtype)).contiguous()
        slots = self._slots(starts)
        finite = x.isfinite().flatten(-2).all(-1)[..., None]  # [batch, heads, C, 1]
        x = torch.where(finite[..., None], x, 0)

        norms = _rms(x)
        norm_codes, norm_range = _rounded(norms, 4)
        held = norm_codes * norm_range[..., :1] + norm_range[..., 1:]
        # A token that is there must not be divided by 0, which the lowest value is if another one is zero.
        norm_codes = torch.where((held < _NOTHING) & (norms >= _NOTHING), 1.0, norm_codes)
        held = (norm_codes * norm_range[..., :1] + norm_range[..., 1:])[..., None]
        x = torch.where(held < _NOTHING, 0, x / held)

        mean_codes = mean_range = None
        if self.shift:
            x = x if self.rope is None else self.rope.unrotate(x, slots)
            mean = x.mean(dim=-2)
            codes, mean_range = _rounded(mean.unflatten(-1, (-1, mean_group(mean.shape[-1]))), self.mean_bits)
            mean = (codes * mean_range[..., :1] + mean_range[..., 1:]).flatten(-2)
            mean_codes = codes.flatten(-2).to(torch.uint8)
            x = x - mean[..., None, :]

        second = _rms(x)[..., None]
        live = (second >= _NOTHING) & (held >= _NOTHING)
        x = torch.where(live, x / second, 0)
        if self.shift and self.rope is not None:
            x = self.rope.rotate(x, slots)
        y = _times(x, matrix(x.shape[-1], x.dtype, x.device).mT)
        indices, signs = self.codebook.search(y)
        gain = self._gain(y, self.codebook.look_up(indices, signs, y.dtype)) * second.squeeze(-1)
        return Chunks(
            codes=indices,
            signs=signs,
            gain=torch.where(live.squeeze(-1), gain.clamp(max=LARGEST), 0).half(),
            norm_codes=pack_nibbles(norm_codes.to(torch.uint8)),
            norm_range=torch.where(finite, norm_range, torch.nan).half(),
            mean_codes=mean_codes if mean_codes is None or self.mean_bits == 8 else pack_nibbles(mean_codes),
            mean_range=None if mean_range is None else mean_range.half(),
        )

    def _gain(self, y: Tensor, q: Tensor) -> Tensor:
        """What the codewords ``q`` of ``y`` [.., W, d] are multiplied by; [.., W]."""
        along, energy = (y * q).sum(-1), y.square().sum(-1)
        if self.gain == "mse":
            return along / q.square().sum(-1).clamp(min=_NOTHING)
        return torch.where(along > 1e-4 * energy, energy / along, 1.0)

    def _decode(self, chunks: Chunks, starts: Tensor, dtype: torch.dtype) -> Tensor:
        y = self.codebook.look_up(chunks.codes, chunks.signs, dtype) * chunks.gain.to(dtype)[..., None]
        x = _times(y, matrix(y.shape[-1], dtype, y.device))
        if chunks.mean_codes is not None:
            mean = self.means(chunks, dtype)[..., None, :]
            x = x + (mean if self.rope is None else self.rope.rotate(mean.expand_as(x), self._slots(starts)))
        return x * self.norms(chunks, dtype)[..., None]


def matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H [size, size], orthonormal, not always symmetric; the same object each time."""
    return _matrix(size, dtype, device)


def mean_group(head_dim: int) -> int:
    """Channels of the mean that share a range."""
    return next(size for size in (32, 16, 8) if head_dim % size == 0)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n], each below 16 -> uint8 [..., n / 2], the first of two in the low four bits."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _times(x: Tensor, square: Tensor) -> Tensor:
    """``x`` [batch, heads, C, W, d] @ ``square`` [d, d].

    A product for each chunk, so that none depends on how many there are: in one product for all, the order of sums may
    change with its size, and with it the last digits and now and then a code.
    """
    rows = x.flatten(0, 2)
    return torch.bmm(rows, square.expand(len(rows), -1, -1)).view(x.shape)


def _rounded(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [..., n], whole numbers in the dtype of ``numbers``, and the range [..., 2] that each n share, as float16
    holds it."""
    low, high = numbers.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(_SMALLEST_STEP, LARGEST)
    held = torch.cat([step, low.clamp(-LARGEST, LARGEST)], dim=-1).half().to(numbers.dtype)
    codes = ((numbers - held[..., 1:]) / held[..., :1]).round().clamp(0, 2**bits - 1)
    return codes, held


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1).sqrt()


@lru_cache(maxsize=64)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        columns = hadamard.multiply(torch.eye(size, dtype=torch.float64)).mT
        return (columns * size**-0.5).to(device, dtype).contiguous()
