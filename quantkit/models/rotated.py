"""A checkpoint seen in another basis of the residual stream: the same function, other tensors.

Everything behind it (calibration, float targets, blocks, the probe, what is written) sees the rotated model alone.
Which tensor changes how: ``transforms/residual.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedConfig

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.transforms.residual import Fusion, Rotation, fusion, rotation, turn


class RotatedCheckpoint(Checkpoint):
    """``source`` with a rotated residual stream. Tensors are rotated when they are read; beside them, one vector of a
    norm and a chunk in float64 are in memory, never another matrix."""

    def __init__(self, source: Checkpoint, fusion: Fusion, rotation: Rotation) -> None:
        copies = {name: source.names[origin] for name, origin in fusion.copies.items()}
        super().__init__(source.folder, source.names | copies)
        self._source = source
        self._fusion = fusion
        self._rotation = rotation
        self.untied = fusion.untied
        """Head and embedding are two matrices from now on."""
        self.basis = f"rotated ({rotation.describe()})" + (", embeddings untied" if fusion.untied else "")

    @property
    def keeps_mean(self) -> bool:
        """The rotation leaves the direction in which all channels are alike."""
        return self._rotation.keeps_mean

    def turn_further(self, matrix: Tensor) -> None:
        """Multiply the rotation from the right by ``matrix``, float64 [hidden, hidden]; before anything is kept."""
        self._rotation = replace(self._rotation, learned=matrix)

    @property
    def source_bytes(self) -> int:
        return self._source.nbytes

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As ``Checkpoint.read_many``, rotated; in the stored dtypes."""
        copies, changes = self._fusion.copies, self._fusion.changes
        names = list(names)
        tensors = self._source.read_many(name for name in names if name not in copies)
        tensors |= {name: self._source.read(copies[name]) for name in names if name in copies}
        gains: dict[str, Tensor | None] = {}
        for name, tensor in tensors.items():
            change = changes.get(name)
            if change is None:
                continue
            if change.gain not in gains:
                gains = {change.gain: self._gain(change.gain)}
            gain = gains[change.gain]
            if change.kind == "weight of a norm" and not bool(tensor.isfinite().all()):
                continue  # broken, and to be seen as such; its readers and its bias do without it
            if change.kind == "bias of a norm" and gain is None:
                continue
            turn(tensor, change, gain, self._rotation, self._fusion.norm_offset)
        return tensors

    def _gain(self, name: str) -> Tensor | None:
        """float64 [hidden] that a norm multiplies by; None: nothing, or it is not finite and stays where it is."""
        if not name:
            return None
        gain = self._source.read(name).double() + self._fusion.norm_offset
        return gain if bool(gain.isfinite().all()) else None


def rotate(
    config: PreTrainedConfig, skeleton: Skeleton, checkpoint: Checkpoint, seed: int
) -> tuple[Skeleton, RotatedCheckpoint]:
    """The model of ``skeleton`` with a rotated residual stream; it must have no ``residual.obstacle``.

    Args:
        config: what ``skeleton`` was built from.
        seed: of the rotation's signs.
    """
    rotated = RotatedCheckpoint(checkpoint, fusion(skeleton), rotation(skeleton, seed))
    if not rotated.untied:
        return skeleton, rotated
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return Skeleton(config, rotated, trust_remote_code=skeleton.trust_remote_code), rotated
