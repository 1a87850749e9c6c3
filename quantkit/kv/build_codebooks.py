"""Builds the codebooks of ``kv/codebooks.py``: ``python -m quantkit.kv.build_codebooks --output FILE --seed 0``.

k-means on numbers drawn from N(0, 1), on their magnitudes for 2 bits, without an end to the samples: each step draws
new ones, assigns them to the nearest of the codewords plus noise, and keeps sums and counts that fade,

    S_k = 0.9 S_k + sum of those of k        n_k = 0.9 n_k + their number        c_k = S_k / n_k

The noise, normal as well, falls to 0 over four fifths of the steps. It keeps k-means from settling in the next best
place: without it the squared error ends 0.5 to 1% higher. A codeword that nothing is assigned to is drawn anew from the
samples that are farthest from theirs. No data is looked at. What is measured is printed and goes into the file's
metadata; random numbers may differ between versions of PyTorch, and then so do the last digits of the codewords.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.kv.codebooks import ENTRIES, TENSORS, WIDTH, Codebook, digest, e8_shell, nearest

VERSION = 1
STEPS = 600
SAMPLES = 32768
"""Drawn in each step."""
_MEMORY = 0.9
_NOISE, _NOISY_SHARE = 0.15, 0.8
"""Standard deviation of the noise at first; share of the steps that have some."""
_TEST_SAMPLES = 2**20
_TOKEN = 128
"""Numbers over which the cosine is taken."""


class Quality(NamedTuple):
    """On numbers from N(0, 1)."""

    error: float
    """Mean squared, per number."""
    cosine: float
    """Mean over tokens of 128 numbers."""
    entropy: float
    """Bits, of the indices; at most 8."""


def lloyd(draw: torch.Generator, signed: bool, steps: int = STEPS, samples: int = SAMPLES) -> Tensor:
    """Codewords, float32 [256, 8]."""

    def drawn(count: int) -> Tensor:
        points = torch.randn(count, WIDTH, generator=draw)
        return points if signed else points.abs()

    codewords = drawn(ENTRIES)
    sums, counts = torch.zeros(ENTRIES, WIDTH), torch.zeros(ENTRIES)
    for step in range(steps):
        points = drawn(samples)
        noise = _NOISE * max(0.0, 1 - step / (_NOISY_SHARE * steps))
        found = nearest(points, codewords + noise * torch.randn(codewords.shape, generator=draw)).long()
        sums = (sums * _MEMORY).index_add_(0, found, points)
        counts = counts * _MEMORY + torch.bincount(found, minlength=ENTRIES)
        codewords = sums / counts.clamp(min=1e-9)[:, None]
        empty = counts < 0.5
        if empty.any():
            farthest = (points - codewords[found]).square().sum(-1).topk(int(empty.sum())).indices
            codewords[empty] = points[farthest]
            sums[empty], counts[empty] = points[farthest], 1.0
    return codewords


def measure(book: Codebook, draw: torch.Generator, samples: int) -> Quality:
    """Of ``book`` on so many fresh vectors."""
    points = torch.randn(samples * WIDTH // _TOKEN, _TOKEN, generator=draw)
    indices, signs = book.search(points)
    read = book.look_up(indices, signs, torch.float32)
    share = torch.bincount(indices.flatten().long(), minlength=ENTRIES).double() / indices.numel()
    return Quality(
        (points - read).square().mean().item(),
        torch.cosine_similarity(points, read, dim=-1).mean().item(),
        -(share * share.clamp(min=1e-12).log2()).sum().item(),
    )


def build(seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All codebooks, float16 [256, 8] each under its tensor's name, and the metadata of the file."""
    draw = torch.Generator().manual_seed(seed)
    vectors = {"kmeans": lloyd(draw, signed=True), "e8": e8_shell(), "magnitudes": lloyd(draw, signed=False)}
    tensors = {TENSORS[name]: vectors[name].half() for name in TENSORS}
    metadata = {"builder": str(VERSION), "seed": str(seed), "samples": str(STEPS * SAMPLES), "sha256": digest(tensors)}
    for name, tensor in TENSORS.items():
        quality = measure(Codebook(name, tensors[tensor], 2 if name == "magnitudes" else 1), draw, _TEST_SAMPLES)
        metadata[f"{tensor}.error"] = f"{quality.error:.5f}"
        metadata[f"{tensor}.cosine"] = f"{quality.cosine:.5f}"
        metadata[f"{tensor}.entropy"] = f"{quality.entropy:.3f}"
    return tensors, metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    arguments = parser.parse_args()
    tensors, metadata = build(arguments.seed)
    save_file(tensors, arguments.output, metadata)
    for name, value in metadata.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
