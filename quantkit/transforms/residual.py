"""One rotation of the whole residual stream, fused into the weights: nothing is left to do at run time.

R1 of QuaRot (Ashkboos et al., arXiv 2404.00456) and SpinQuant (Liu et al., arXiv 2405.16406). With R orthogonal
[hidden, hidden] and g, b the weight and bias of a norm, the stream x becomes x @ R:

    embeddings, learned positions     E @ R
    writers (o, down, of experts)     R.T @ W,  bias @ R
    readers, head                     W diag(g) @ R           routers, shared-expert gates and all experts, too
    norms                             g -> 1,  b -> (b / g) @ R

R.T x has the length of x, so an RMS norm without a weight turns with its input, whatever R:

    R = diag(signs) @ H.T / sqrt(n)                           H: ``kernels/hadamard.py``, signs +-1

LayerNorm subtracts the mean as well. It turns with its input where 1 @ R = 1: the mean of x @ R is then that of x, and
(x - mean) @ R = x @ R - mean.

    R = H1.T @ diag(signs) @ H1 / n,  signs[0] = 1            H1 = H diag(H[0]): its first row is ones

Against QuaRot: nothing is centred. Embeddings of an RMS norm may not be (it sees the mean), and those of a LayerNorm
need not be with this R. Matrices of all sizes are there, and so is b where the readers have no bias to take it. As in
SpinQuant, R can be learned from there (``learn/rotation.py``).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import hadamard
from quantkit.kernels.online import apply
from quantkit.models.architectures import Residual
from quantkit.models.sites import writers

if TYPE_CHECKING:
    from quantkit.models.checkpoint import Checkpoint
    from quantkit.models.skeleton import Skeleton

_CHUNK = 2**20
"""Elements that are in float64 at a time: a few copies of 8 MiB."""


@dataclass(frozen=True)
class Rotation:
    """R of one model."""

    signs: Tensor
    """int8 [hidden], +-1; the first is 1 where ``keeps_mean``."""
    keeps_mean: bool
    """1 @ R = 1."""
    learned: Tensor | None = None
    """float64 [hidden, hidden], orthogonal: R is what the signs say times this. None: I."""

    def __call__(self, x: Tensor) -> Tensor:
        """x @ R for float64 ``x`` [..., hidden]."""
        y = self._drawn(x)
        return y if self.learned is None else y @ self.learned

    def _drawn(self, x: Tensor) -> Tensor:
        if not self.keeps_mean:
            return apply(x, LayerInputs(signs=self.signs))
        width = len(self.signs)
        first = torch.zeros(width, dtype=x.dtype)
        first[0] = 1
        flips = hadamard.multiply(first, transpose=True).sign()
        y = hadamard.multiply(x * flips) * self.signs.to(x.dtype)
        return hadamard.multiply(y, transpose=True) * flips / width

    def describe(self) -> str:
        kind = "Hartley" if hadamard.split(len(self.signs)).kind == "hartley" else "Hadamard"
        return f"{kind}, {len(self.signs)} channels" + (", mean kept" if self.keeps_mean else "")


@dataclass(frozen=True)
class Change:
    """What becomes of one stored tensor."""

    kind: Literal["reads", "writes", "weight of a norm", "bias of a norm"]
    """reads: its last dimension is that of the stream, multiplied by ``gain`` and turned. writes: the last but one."""
    gain: str = ""
    """Stored name of the norm's weight that comes in; empty: none does."""


@dataclass(frozen=True)
class Fusion:
    """Everything that changes in a checkpoint. All names are those in its files."""

    changes: Mapping[str, Change]
    copies: Mapping[str, str]
    """Tensor that the files lack, because it was tied -> the one that it was tied to and starts as a copy of."""
    norm_offset: float
    """Norms multiply by norm_offset + weight."""
    untied: bool
    """Head and embedding were one matrix and cannot be: only the head takes the weight of the last norm."""


def rotation(skeleton: Skeleton, seed: int) -> Rotation:
    """The random rotation for the model of ``skeleton``, which has no ``obstacle``."""
    residual, width = _facts(skeleton), int(skeleton.config.hidden_size)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} residual {width}".encode()))
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
    if residual.centred:
        signs[0] = 1
    return Rotation(signs, residual.centred)


def fusion(skeleton: Skeleton) -> Fusion:
    """What changes in the checkpoint of ``skeleton``, whose table says how its residual stream is fed."""
    residual, architecture = _facts(skeleton), skeleton.architecture
    assert architecture is not None
    found: dict[str, Change] = {}
    copies: dict[str, str] = {}

    def add(module: str, leaf: str, change: Change) -> None:
        stored = skeleton.stored_in(f"{module}.{leaf}")
        if stored:
            found[stored] = change

    def reads(modules: list[str], norm: str) -> None:
        gain = skeleton.stored_in(f"{norm}.weight") or ""
        for module in modules:
            add(module, "weight", Change("reads", gain))
        if gain:
            add(norm, "weight", Change("weight of a norm"))
            add(norm, "bias", Change("bias of a norm", gain))

    def writes(module: str) -> None:
        add(module, "weight", Change("writes"))
        add(module, "bias", Change("reads"))  # a row of the stream

    for index in range(skeleton.num_blocks):
        prefix = skeleton.block_prefix(index)
        for site in skeleton.sites(index):
            if site.kind != "linear":
                reads([prefix + name for name in site.consumers], prefix + site.producer if site.producer else "")
        for name in writers(architecture, skeleton.block_module(index)):
            writes(prefix + name)
    add(residual.positions, "weight", Change("reads"))
    if skeleton.stored_in(f"{residual.project_in}.weight"):
        writes(residual.project_in)
    else:
        add(residual.embedding, "weight", Change("reads"))
    if skeleton.stored_in(f"{residual.project_out}.weight"):
        reads([residual.project_out], residual.norm)
        return Fusion(found, copies, architecture.norm_offset, untied=False)
    if skeleton.tied:
        ends = [f"{end}.weight" for end in (residual.embedding, residual.head)]
        for end, other in (ends, ends[::-1]):
            partner = skeleton.stored_in(other)
            if skeleton.stored_in(end) is None and partner:
                copies[skeleton.checkpoint_name(end)] = partner
    reads([residual.head], residual.norm)
    for name in copies:
        is_head = name == skeleton.checkpoint_name(f"{residual.head}.weight")
        gain = (skeleton.stored_in(f"{residual.norm}.weight") or "") if is_head else ""
        found[name] = Change("reads", gain)
    return Fusion(found, copies, architecture.norm_offset, untied=skeleton.tied)


def obstacle(skeleton: Skeleton, checkpoint: Checkpoint) -> str:
    """Why the residual stream of this model cannot be rotated; empty: it can. Only vectors of norms are read."""
    if skeleton.architecture is None:
        return f"{skeleton.class_name} is not in quantkit's architecture tables"
    residual = skeleton.architecture.residual
    if isinstance(residual, str):
        return f"{skeleton.class_name}: {residual}"
    for condition in residual.conditions:
        if getattr(skeleton.config, condition.key) != condition.value:
            return f"{skeleton.class_name} with {condition.key} != {condition.value}: {condition.why}"
    changed = fusion(skeleton)
    outside = {f"{path}.weight" for path in (residual.embedding, residual.head)}  # behind projections
    for stored, canonical in skeleton.names.canonical.items():
        matrix = len(checkpoint.names[stored].shape) > 1
        if matrix and stored not in changed.changes and canonical not in outside:
            return f"what tensor {stored} has to do with the residual stream is not known"
    for stored in skeleton.extra_tensors():
        info = checkpoint.names[stored]
        if info.dtype.is_floating_point and len(info.shape) == 2 and skeleton.config.hidden_size in info.shape:
            return f"tensor {stored}, which transformers does not load, may read the residual stream"
    for stored, change in changed.changes.items():
        if change.kind == "bias of a norm":
            gain, bias = checkpoint.read(change.gain).double() + changed.norm_offset, checkpoint.read(stored)
            broken = not bool((gain + bias).isfinite().all())  # the block says so when its turn comes
            if not broken and not bool(_unscaled(bias, gain).to(bias.dtype).isfinite().all()):
                return f"{change.gain} is 0 for a channel whose bias is not: no weight of 1 with another bias does that"
    return ""


def turn(tensor: Tensor, change: Change, gain: Tensor | None, rotation: Rotation, norm_offset: float) -> None:
    """Apply ``change`` to ``tensor`` in place: in float64, a chunk at a time, and cast to its dtype last.

    Args:
        tensor: contiguous, floating; readers [..., hidden], writers [..., hidden, in_features].
        gain: float64 [hidden]: norm_offset + the norm's weight, where the change names one.
    """
    if change.kind == "weight of a norm":
        tensor.fill_(1 - norm_offset)
        return
    if change.kind == "bias of a norm":
        assert gain is not None
        tensor.copy_(rotation(_unscaled(tensor, gain)))
        return
    width = len(rotation.signs)
    step = max(_CHUNK // width, 1)
    if change.kind == "writes":
        for matrix in tensor.view(-1, width, tensor.shape[-1]):
            for start in range(0, matrix.shape[1], step):
                part = matrix[:, start : start + step]
                part.copy_(rotation(part.double().mT).mT)
        return
    for part in tensor.view(-1, width).split(step):
        wide = part.double()
        part.copy_(rotation(wide if gain is None else wide * gain))


def _unscaled(bias: Tensor, gain: Tensor) -> Tensor:
    """float64 b / g [hidden]; 0 where both are."""
    wide = bias.double()
    return torch.where(wide == 0, wide, wide / gain)


def _facts(skeleton: Skeleton) -> Residual:
    assert skeleton.architecture is not None
    assert isinstance(skeleton.architecture.residual, Residual)
    return skeleton.architecture.residual
