"""A tiny model in float64 whose blocks can be rewritten by folds, and the logits it then has.

What folds leave to the caller, x * t + c in front of linears whose site cannot hold it, is done by hooks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_models import load_tiny
from torch import Tensor

from quantkit.models.block import Block, Site
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config

IDS = torch.arange(24).view(2, 12) * 7 % 199

Online = dict[str, tuple[Tensor, Tensor]]
"""Full path of a linear -> (t, c), each [in_features] or a scalar."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Folded:
    """The model in ``folder``, float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        config = load_config(folder)
        config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
        self.skeleton = Skeleton(config, self.checkpoint)

    def block(self, index: int) -> Block:
        """A block whose working copies and stored tensors are float64, so that only the algebra is tested.

        Gemma's norms compute in float32 whatever the model's dtype: multiples of 1/256 come through that exactly.
        """
        block = self.skeleton.read_block(index, self.checkpoint)
        block.tensors = {name: tensor.double() for name, tensor in block.tensors.items()}
        if self.in_float32:
            for name, tensor in block.tensors.items():
                if tensor.dim() == 1:
                    block.tensors[name] = tensor.mul(256).round().div(256)
        block.stored_dtypes = dict.fromkeys(block.tensors, torch.float64)
        return block

    def blocks(self) -> list[Block]:
        return [self.block(index) for index in range(self.skeleton.num_blocks)]

    @property
    def in_float32(self) -> bool:
        """The norms multiply by their weight in float32."""
        return bool(self.skeleton.architecture and self.skeleton.architecture.norm_offset)

    def factor(self, width: int, seed: int, norm: bool = False) -> Tensor:
        """t [width], log-normal; powers of two for a norm that computes in float32."""
        t = normal(width, seed=seed).exp()
        return t.log2().round().exp2() if norm and self.in_float32 else t

    @torch.inference_mode()
    def logits(self, blocks: list[Block], online: Online | None = None) -> Tensor:
        """Of the model with ``blocks`` in place of its own, ``online`` done to the inputs of linears."""
        model = load_tiny(self.folder, dtype=torch.float64, experts_implementation="eager").eval()
        for block in blocks:
            module = self.skeleton.build_block(block.index, block.tensors, torch.float64)
            model.get_submodule(self.skeleton.blocks_path)[block.index] = module
        for path, (t, c) in (online or {}).items():
            model.get_submodule(path).register_forward_pre_hook(_changing(t, c))
        # BLOOM's softmax is in float32 whatever the dtype: its rows sum to 1 up to 1e-7, and shifted values show that.
        with patch("torch.nn.functional.softmax", lambda x, dim=None, **_: torch.softmax(x, dim)):
            result: Tensor = model(IDS, use_cache=False).logits
        return result


def signal_width(block: Block, site: Site) -> int:
    return block.weight(site.consumers[0]).shape[1] // site.repeats


def _changing(t: Tensor, c: Tensor) -> Any:
    return lambda _, args: (args[0] * t + c,)
