"""A tiny model opened for the block loop, and samples to send through it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import VOCABULARY, load_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.models.stream import BlockStream


class Opened:
    """Skeleton, checkpoint and stream of a model folder; everything in float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        self.skeleton = Skeleton(load_config(folder), self.checkpoint)
        self.stream = BlockStream(self.skeleton, self.checkpoint, torch.float32)

    def block(self, index: int) -> nn.Module:
        tensors = self.skeleton.read_block(index, self.checkpoint).tensors
        return self.skeleton.build_block(index, tensors, torch.float32)

    def linears(self, index: int) -> list[str]:
        return [info.name for info in self.skeleton.linears(index)]

    def readers(self, index: int) -> list[str]:
        """Every linear, and every other module that reads a site (routers)."""
        consumers = [name for site in self.skeleton.sites(index) for name in site.consumers]
        return list(dict.fromkeys(self.linears(index) + consumers))

    def whole(self) -> PreTrainedModel:
        """The model as transformers loads it."""
        model: PreTrainedModel = load_tiny(self.folder, dtype=torch.float32)
        return model.eval()


def sample_ids(padded: bool) -> tuple[Tensor, Tensor | None]:
    """ids [5, 9] and, if ``padded``, a mask [5, 9] with left padding of 0 to 7 tokens; otherwise None."""
    ids = torch.randint(3, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(0))
    if not padded:
        return ids, None
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [7], [0], [2]])).long()
    return ids * mask, mask
