"""Weights of a finished checkpoint as they are decoded, one linear at a time in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.eval.report.record import LayerRow
from quantkit.formats.layer import from_tensors
from quantkit.models.checkpoint import Checkpoint

BINS = 81
"""Odd: no level of a symmetric grid lies on the border of two bins."""


@dataclass(frozen=True, eq=False)
class WeightPicture:
    """How the weights of one linear are distributed."""

    layer: LayerRow
    edges: Tensor
    """[BINS + 1] float32, values."""
    values: Tensor
    """[BINS] float64, share of the weights in each."""
    codes: Tensor
    """[2**bits] float64, share of the weights that have this code."""


def weight_pictures(folder: Path, layers: Iterable[LayerRow]) -> list[WeightPicture]:
    """Read ``layers`` of the checkpoint in ``folder``.

    Raises:
        QuantkitError: the checkpoint is damaged or lacks one of them.
    """
    checkpoint = Checkpoint.open(folder)
    return [_picture(checkpoint, layer) for layer in layers]


def _picture(checkpoint: Checkpoint, layer: LayerRow) -> WeightPicture:
    names = [name for name in checkpoint.names if name.rpartition(".")[0] == layer.stored]
    if f"{layer.stored}.weight_scale" not in names:
        raise QuantkitError(
            f"{checkpoint.folder} has no quantised weight '{layer.stored}', of which its run record tells: "
            "the two do not belong together; quantise again."
        )
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in checkpoint.read_many(names).items()}
    weight, _ = from_tensors(tensors, layer.format)
    values = weight.dequantize()
    end = max(float(values.abs().max()), torch.finfo(torch.float32).tiny)
    counts = torch.histc(values, BINS, -end, end).double()
    codes = torch.bincount(weight.codes.flatten(), minlength=2**weight.bits).double()
    return WeightPicture(
        layer, torch.linspace(-end, end, BINS + 1), counts / values.numel(), codes / weight.codes.numel()
    )
