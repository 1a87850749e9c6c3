"""Codebooks of 256 vectors in eight dimensions for numbers that are close to N(0, 1), and the search in them.

    1 bit     a byte for eight numbers: the index of a signed codeword
    2 bits    two bytes: the index of a codeword of magnitudes, and the signs (bit j set: number j is not negative)

The nearest codeword is the one with the least squared distance, argmax_k <y, c_k> - |c_k|**2 / 2; codewords are not
normalised, since their lengths code the length of y. NSNQuant (Son et al., arXiv 2505.18231) has both widths.

``e8`` are the 240 shortest vectors of the lattice E8 and the 16 vectors +-2 e_i, times s. It is found by a formula: of
a = |y| with the sum A, the largest entries a1 >= a2, the least a8 and the parity p of the number of negative ones,

    +-e_i +-e_j              s (a1 + a2) - s**2             0 .. 111    i < j, each pair with ++, +-, -+, --
    (+-1/2)**8, even         s (A / 2 - p a8) - s**2        112 .. 239  bit j: number j < 7 is negative
    +-2 e_i                  2 s a1 - 2 s**2                240 .. 255  each i with +, -
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from quantkit.errors import QuantkitError

WIDTH = 8
"""Numbers that share an index."""
ENTRIES = 256
E8_SCALE = float(torch.tensor(1.63, dtype=torch.float16))
"""The one with the least squared error on N(0, 1); as float16 holds it, so that the stored vectors are exact."""
SHIPPED = "nsn_codebooks_v1.safetensors"
TENSORS: Mapping[str, str] = {"kmeans": "cb1_kmeans", "e8": "cb1_e8", "magnitudes": "cb2_mag"}
"""Name of a shipped codebook -> the tensor that it is stored in."""

_ROWS = 16384
"""Vectors that are compared with all codewords at a time: 16 MiB of float32 scores."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """256 codewords."""

    name: str
    """One of ``TENSORS``, or the path of a file."""
    vectors: Tensor
    """float16 [256, 8]"""
    bits: Literal[1, 2]
    """1: signed; 2: magnitudes, none of them negative."""

    def search(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """The nearest codewords.

        Args:
            numbers: [..., 8 * n], float32 or float64. What is not finite gets any index.

        Returns:
            indices, uint8 [..., n], and, with 2 bits, signs, uint8 [..., n].
        """
        points = numbers.unflatten(-1, (-1, WIDTH))
        if self.name == "e8":
            return _search_e8(points), None
        flat = (points if self.bits == 1 else points.abs()).reshape(-1, WIDTH)
        found = nearest(flat, self.on(numbers.device).to(numbers.dtype)).view(points.shape[:-1])
        return found, None if self.bits == 1 else pack_signs(points >= 0)

    def look_up(self, indices: Tensor, signs: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers [..., 8 * n] in ``dtype`` that what ``search`` returns stands for."""
        numbers = torch.embedding(self.on(indices.device).to(dtype), indices.int())
        if signs is not None:
            numbers *= torch.embedding(_sign_table(indices.device).to(dtype), signs.int())
        return numbers.flatten(-2)

    def on(self, device: torch.device) -> Tensor:
        """``vectors`` on ``device``, the same object each time."""
        return _moved(self, device)


def nearest(points: Tensor, codewords: Tensor) -> Tensor:
    """Indices, uint8 [n], of the ``codewords`` [256, 8] next to ``points`` [n, 8]; the lowest of equals."""
    half = codewords.square().sum(-1) / 2
    found = [(part @ codewords.mT).sub_(half).argmax(-1).to(torch.uint8) for part in points.split(_ROWS)]
    return torch.cat(found) if found else points.new_zeros(0, dtype=torch.uint8)


def pack_signs(positive: Tensor) -> Tensor:
    """bool [..., 8] -> uint8 [...], bit j from entry j."""
    places = 2 ** torch.arange(WIDTH, device=positive.device)
    return (positive * places).sum(-1).to(torch.uint8)


def e8_shell() -> Tensor:
    """float16 [256, 8], in the order that is given above."""
    rows: list[list[float]] = []
    for i, j in combinations(range(WIDTH), 2):
        for one, other in product((1.0, -1.0), repeat=2):
            rows.append([one if k == i else other if k == j else 0.0 for k in range(WIDTH)])
    for number in range(2 ** (WIDTH - 1)):
        negative = [number >> k & 1 for k in range(WIDTH - 1)]
        rows.append([0.5 - bit for bit in (*negative, sum(negative) % 2)])
    for i in range(WIDTH):
        rows.extend([sign if k == i else 0.0 for k in range(WIDTH)] for sign in (2.0, -2.0))
    return (torch.tensor(rows) * E8_SCALE).half()


def load(name: str, bits: Literal[1, 2]) -> Codebook:
    """A codebook, the same object each time.

    Args:
        name: one of ``TENSORS``, or the path of a safetensors file: with one tensor [256, 8], or made by
            ``python -m quantkit.kv.build_codebooks``.
        bits: what it is going to be used for.

    Raises:
        QuantkitError: no such file, what is in it is no such codebook, or it is one of the other width.
    """
    book = _load(name, bits)
    if book.bits != bits:
        kind = "signed codewords (1 bit)" if book.bits == 1 else "magnitudes (2 bits)"
        way_out = "e8 or kmeans, or a file of signed ones" if bits == 1 else "magnitudes, or a file of such"
        raise QuantkitError(f"codebook '{name}' holds {kind}, but was given for {bits} bits; use {way_out}.")
    return book


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bytes of all tensors, in the order of their names."""
    content = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=16)
def _load(name: str, bits: Literal[1, 2]) -> Codebook:
    if name == "e8":
        return _checked(name, e8_shell())
    if name in TENSORS:
        return _checked(name, _tensors(files("quantkit.kv").joinpath(SHIPPED).read_bytes(), name)[TENSORS[name]])
    path = Path(name).expanduser()
    if not path.is_file():
        raise QuantkitError(f"codebook '{name}': no such file; use one of {', '.join(TENSORS)}, or a safetensors file.")
    tensors = _tensors(path.read_bytes(), name)
    own = TENSORS["kmeans" if bits == 1 else "magnitudes"]
    if len(tensors) != 1 and own not in tensors:
        raise QuantkitError(f"codebook '{name}' has the tensors {', '.join(sorted(tensors))}; it needs one, or {own}.")
    return _checked(name, tensors.get(own, next(iter(tensors.values()))))


def _tensors(content: bytes, name: str) -> dict[str, Tensor]:
    try:
        return load_bytes(content)
    except (SafetensorError, ValueError) as error:
        raise QuantkitError(f"codebook '{name}' is no safetensors file ({error}); fetch or build it again.") from None


def _checked(name: str, vectors: Tensor) -> Codebook:
    if tuple(vectors.shape) != (ENTRIES, WIDTH) or not vectors.is_floating_point():
        raise QuantkitError(
            f"codebook '{name}' is {vectors.dtype} {list(vectors.shape)}; it has to be floating point "
            f"[{ENTRIES}, {WIDTH}]."
        )
    with torch.inference_mode(False):
        half = vectors.half()
    if not half.isfinite().all():
        raise QuantkitError(f"codebook '{name}' has entries that float16 does not hold; they have to be finite.")
    return Codebook(name, half, 1 if half.min() < 0 else 2)


@lru_cache(maxsize=32)
def _moved(book: Codebook, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return book.vectors.to(device)


@lru_cache(maxsize=8)
def _sign_table(device: torch.device) -> Tensor:
    """int8 [256, 8]: +1 where bit j of the byte is set, else -1."""
    with torch.inference_mode(False):
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(WIDTH, device=device) & 1
        return (2 * bits - 1).to(torch.int8)


def _search_e8(points: Tensor) -> Tensor:
    """Indices, uint8 [...], of the codewords of ``e8`` next to ``points`` [..., 8]."""
    sizes, negative = points.abs(), (points < 0).long()
    (first, second), (i, j) = (part.unbind(-1) for part in sizes.topk(2, dim=-1))
    least, last = sizes.min(dim=-1)
    odd = negative.sum(-1) % 2
    scores = torch.stack(
        [
            E8_SCALE * (first + second) - E8_SCALE**2,
            E8_SCALE * (sizes.sum(-1) / 2 - odd * least) - E8_SCALE**2,
            2 * E8_SCALE * first - 2 * E8_SCALE**2,
        ]
    )
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    pair = low * (2 * WIDTH - 1 - low) // 2 + high - low - 1  # i < j, counted in order
    sign_low, sign_high = (negative.gather(-1, at[..., None]).squeeze(-1) for at in (low, high))
    flipped = negative.scatter_add(-1, last[..., None], odd[..., None]) % 2
    halves = (flipped[..., :-1] * 2 ** torch.arange(WIDTH - 1, device=points.device)).sum(-1)
    sign_first = negative.gather(-1, i[..., None]).squeeze(-1)
    each = torch.stack([4 * pair + 2 * sign_low + sign_high, 112 + halves, 240 + 2 * i + sign_first])
    return each.gather(0, scores.argmax(0, keepdim=True)).squeeze(0).to(torch.uint8)
