"""Edits that make a model hard to quantise and leave its function as it is; seeded.

``spread_columns``: every column of a norm's consumers times exp(N(0, 1)), undone in the norm: hard weights, easy
activations. ``add_outliers``: about 1 % of every norm's channels times 25 to 70, undone in the consumers; where norm
and consumers have biases, half of those channels also get an offset of +-35, undone in the consumers' biases.

They are written out here and do not use ``quantkit.transforms.fold``, so that either can be tested with the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from quantkit.models.block import Block, Site
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config

Edit = Callable[[Block, Generator], None]


def spread_columns(block: Block, generator: Generator) -> None:
    """Spread the columns of every norm's consumers log-normally, in place."""
    for site in _norms(block):
        width = block.tensors[f"{site.producer}.weight"].numel()
        _rescale(block, site, torch.randn(width, generator=generator, dtype=torch.float64).neg().exp())


def add_outliers(block: Block, generator: Generator) -> None:
    """Make a few channels of every norm's output large, and where the model can hold it also far from zero."""
    for site in _norms(block):
        width = block.tensors[f"{site.producer}.weight"].numel()
        chosen = torch.randperm(width, generator=generator)[: max(2, round(width / 100))]
        factor = torch.ones(width, dtype=torch.float64)
        factor[chosen] = 25 + 45 * torch.rand(len(chosen), generator=generator, dtype=torch.float64)
        _rescale(block, site, factor)
        biases = [f"{module}.bias" for module in (site.producer, *site.consumers)]
        if all(bias in block.tensors for bias in biases):
            offset = torch.zeros(width, dtype=torch.float64)
            half = chosen[: len(chosen) // 2]
            signs = torch.randint(0, 2, (len(half),), generator=generator)
            offset[half] = 35.0 * (2 * signs - 1).double()
            _shift(block, site, offset)


def inject(source: Path, out: Path, edits: Sequence[Edit], seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a copy of the model in ``source`` with ``edits`` applied to every block; returns ``out``.

    The default dtype keeps the copy's outputs equal to the source's up to float32 arithmetic; the 8 bits of a bfloat16
    significand would add an error of their own, of about the size of 8-bit rounding.
    """
    checkpoint = Checkpoint.open(source)
    config = load_config(source)
    skeleton = Skeleton(config, checkpoint)
    tensors = checkpoint.read_many(checkpoint.names)
    generator = torch.Generator().manual_seed(seed)
    for index in range(skeleton.num_blocks):
        block = skeleton.read_block(index, checkpoint)
        block.tensors = {name: t.double() if t.is_floating_point() else t for name, t in block.tensors.items()}
        for edit in edits:
            edit(block, generator)
        tensors |= {skeleton.checkpoint_name(block.prefix + name): tensor for name, tensor in block.tensors.items()}
    out.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, out / file.name)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    stored = {name: t.to(dtype).contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


EDITS: dict[str, Edit] = {"spread": spread_columns, "outliers": add_outliers}
"""By the name that benchmarks take."""


def _norms(block: Block) -> list[Site]:
    return [site for site in block.sites if site.kind == "norm"]


def _rescale(block: Block, site: Site, factor: Tensor) -> None:
    """Multiply what the norm emits by ``factor`` and divide the consumers' columns."""
    tensors, norm = block.tensors, f"{site.producer}.weight"
    tensors[norm] = (tensors[norm] + site.norm_offset) * factor - site.norm_offset
    if f"{site.producer}.bias" in tensors:
        tensors[f"{site.producer}.bias"] = tensors[f"{site.producer}.bias"] * factor
    for consumer in site.consumers:
        tensors[f"{consumer}.weight"] = tensors[f"{consumer}.weight"] / factor


def _shift(block: Block, site: Site, offset: Tensor) -> None:
    """Add ``offset`` to what the norm emits and take it out of the consumers' biases."""
    tensors = block.tensors
    tensors[f"{site.producer}.bias"] = tensors[f"{site.producer}.bias"] + offset
    for consumer in site.consumers:
        tensors[f"{consumer}.bias"] = tensors[f"{consumer}.bias"] - tensors[f"{consumer}.weight"] @ offset
