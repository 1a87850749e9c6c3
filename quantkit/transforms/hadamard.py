"""Hadamard rotations (Ashkboos et al., QuaRot, arXiv 2404.00456): no channel stands out of an input that is rounded.

    y = W @ x   becomes   y = (W @ R.T) @ (R @ x)        R = H @ diag(signs) / sqrt(n), H a Hadamard matrix, signs +-1

R is orthogonal and its entries have one size, so an outlier of one channel is spread evenly over all of them, and so is
one in a row of W. Unless asked for, nothing is learned and no data is needed. Inputs are rotated at run time in front
of each quantised linear; what else reads them (routers, the residual) sees them as they were. Norms are folded into
what reads them first: a rotation mixes columns of a weight, so rounding errs as much in those that meet large inputs as
in all others, and an offset would be spread over all channels. Values are rotated within their heads at no cost, by
matrices in v and o: attention only sums them.

What reads the residual stream can have it for nothing, too: ``residual`` rotates the stream of the whole model once,
in the weights (``residual.py``), before this or any other step sees a block. attention.input and mlp.input are then
rotated already. That rotation and those of values can be learned, as in SpinQuant (Liu et al., arXiv 2405.16406).

Against QuaRot: every rotation at run time is of its own input, so any of them can be left out; sizes for which no
Hadamard matrix is known are rotated, too (``kernels/hadamard.py``).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.hadamard import split
from quantkit.kernels.online import apply
from quantkit.learn.rotation import Learned, learn_rotation
from quantkit.models.block import Block, Site
from quantkit.transforms.fold import shift_obstacle
from quantkit.transforms.interface import Online, SiteChange, Situation, Solution

if TYPE_CHECKING:
    from quantkit.calibrate.statistics import Want

Place = Literal["attention.input", "attention.value", "attention.output", "mlp.input", "mlp.hidden", "other"]
_EXPERT = re.compile(r"\.\d+(?=\.)")
_LARGEST = 1e4
"""A norm's weight beyond this, or below 1 over it, stays: readers would leave float16."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``hadamard``."""

    sites: Literal["all"] | Annotated[tuple[Place, ...], Field(min_length=1)] = Field(
        "all",
        description="what is rotated: attention.input, mlp.input, mlp.hidden (also of experts), other (what the table "
        "of the architecture does not cover) at run time; attention.value: values within heads, free of cost; "
        "attention.output: across heads as well, at run time, and not part of all",
    )
    residual: Literal["auto", "always", "never"] = Field(
        "auto",
        description="rotate the residual stream of the whole model, in the weights and free of cost, instead of "
        "attention.input and mlp.input at run time; auto: where sites name both, no transform comes before and the "
        "model allows it without untying its embeddings; always: or refuse",
    )
    norms: Literal["auto", "always", "never"] = Field(
        "auto",
        description="fold the weights of norms, and their biases where all readers have one, into what reads them in "
        "front of a rotation at run time; auto: where no transform comes before, whose work that would undo",
    )
    learn_steps: int = Field(
        0,
        ge=0,
        description="learn the rotations of the residual stream and of values in so many steps from the Hadamard "
        "matrices, for what rounding of inputs loses; needs residual: always, a scheme that rounds activations, and "
        "calibration data",
    )

    @property
    def fuses(self) -> Literal["auto", "always", "never"]:
        """Is the residual stream to be rotated? auto: if nothing stands against it."""
        if self.residual == "auto" and not (self.wants("attention.input") and self.wants("mlp.input")):
            return "never"
        return self.residual

    def settled(self, fused: bool, first: bool) -> Config:
        """These options, ``residual`` and ``norms`` decided.

        Args:
            fused: the residual stream is rotated.
            first: no transform comes before.
        """
        norms = self.norms if self.norms != "auto" else "always" if first else "never"
        return self.model_copy(update={"residual": "always" if fused else "never", "norms": norms})

    def wants(self, place: Place) -> bool:
        if self.residual == "always" and place in ("attention.input", "mlp.input"):
            return False
        return place != "attention.output" if self.sites == "all" else place in self.sites


def statistics(config: Config) -> tuple[Want, ...]:
    """Rows of values, to learn from."""
    return ("rows",) if config.learn_steps else ()


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    """Every linear whose input is rotated at run time."""
    return {name: frozenset({"hadamard"}) for name, _ in _rotated(sites, linears, config)}


def solve(situation: Situation, config: Config) -> Solution:
    """Rotations with signs drawn for every block and input, alike for all experts of a block.

    Linears that read one tensor get one rotation. Values are rotated only where both v and o are quantised: rounding
    of a weight that is stored as it stands could not be made up for.
    """
    block, linears = situation.block, situation.linears
    widths: dict[tuple[str, int], None] = {}
    rotations = {}
    for name, label in _rotated(block.sites, linears, config):
        width = block.weight(name).shape[1]
        widths[label, width] = None
        rotations[name] = LayerInputs(signs=_signs(situation, label, width))
    matrices = {}
    for site in block.sites:
        if site.head_dim and config.wants("attention.value") and {site.producer, *site.consumers} <= set(linears):
            signs = LayerInputs(signs=_signs(situation, site.name, site.head_dim))
            # Rows of the identity become the columns of R: v @ R.T is R @ v.
            matrices[site.name] = apply(torch.eye(site.head_dim, dtype=torch.float64), signs)
            widths[site.name, site.head_dim] = None
    facts: list[dict[str, Any]] = [
        {"site": label, "width": width, "matrix": _matrix_kind(width)} for label, width in widths
    ]
    if config.learn_steps:
        of_site = {fact["site"]: fact for fact in facts}
        for site in block.sites:
            if site.name in matrices:
                learned = _learned(situation, site, matrices[site.name], config.learn_steps)
                matrices[site.name] = matrices[site.name] @ learned.matrix
                of_site[site.name] |= {"loss_before": learned.before, "loss": learned.after}
    changes = {
        site.name: _plain_norm(block, site)
        for site in block.sites
        if site.kind == "norm" and config.norms != "never" and rotations.keys() & site.consumers
    }
    return Solution(sites=changes, matrices=matrices, ops=rotations, facts=facts)


def _plain_norm(block: Block, site: Site) -> SiteChange:
    """What makes the norm of ``site`` one without weight and, where its readers can take it, without bias."""
    gain = (block.weight(site.producer).double() + site.norm_offset).abs()
    usual = (gain > 1 / _LARGEST) & (gain < _LARGEST)
    shift = None if shift_obstacle(block, site) else block.tensors[f"{site.producer}.bias"].double().clone()
    return SiteChange(gain.reciprocal().where(usual, 1.0), shift)


def _learned(situation: Situation, site: Site, start: Tensor, steps: int) -> Learned:
    """What to turn values further by, behind ``start`` [head_dim, head_dim]: one matrix for all heads of a block."""
    activations = situation.scheme.activations
    assert situation.observed is not None
    assert activations is not None
    rows = situation.observed.statistics.of_site(site).rows
    samples = rows.unflatten(-1, (-1, site.head_dim)) @ start.float()
    return learn_rotation(samples, activations, steps, situation.seed)


def _rotated(sites: Iterable[Site], linears: Collection[str], config: Config) -> Iterator[tuple[str, str]]:
    """(linear, label) of every input that is rotated at run time; what reads one tensor has one label."""
    covered = set()
    for site in sites:
        place: Any = "attention.output" if site.head_dim else site.name
        if place not in get_args(Place):
            place = "mlp.hidden"  # of an expert
        for name in site.consumers:
            covered.add(name)
            if name in linears and config.wants(place):
                yield name, _EXPERT.sub(".*", "attention.output" if site.head_dim else site.name)
    if config.wants("other"):
        yield from ((name, "other") for name in sorted(set(linears) - covered))


def _signs(situation: Situation, label: str, width: int) -> Tensor:
    """int8 [width], +-1; of inputs that no site names, all of one width are alike: some of them may be one tensor."""
    seed = zlib.crc32(f"{situation.seed} {situation.block.index} {label} {width}".encode())
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1


def _matrix_kind(width: int) -> str:
    return "hartley" if split(width).kind == "hartley" else "hadamard"
