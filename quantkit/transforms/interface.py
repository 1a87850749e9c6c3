"""What a transform is given and what it returns.

A transform is a module with ``Config``, ``online(sites, linears, config)`` and ``solve(situation, config)``. It
computes numbers; ``transforms/apply.py`` and ``fold.py`` write them into the block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quantkit.formats.kv import AnyKV, LearnedKV
from quantkit.formats.layer import LayerInputs
from quantkit.kernels.online import kronecker_split
from quantkit.models.block import Block, Site
from quantkit.quantizers import rtn
from quantkit.recipe import Scheme, WeightScheme

if TYPE_CHECKING:
    from quantkit.calibrate.hidden import HiddenStates
    from quantkit.calibrate.observe import BlockStatistics
    from quantkit.calibrate.replay import Replay
    from quantkit.calibrate.streams import StreamName, Streams

InputOp = Literal["scale", "shift", "hadamard", "kronecker", "dense", "clip"]
Online = dict[str, frozenset[InputOp]]
"""Linear -> what may be done to its input at run time; the three matrices exclude each other. Where one of them is
announced, no other transform may follow: behind it there are no channels that could be told apart. Of ``kronecker`` the
left factor has ``kronecker_left`` rows. ``clip`` is for dynamic activations; others ignore it."""


@dataclass(frozen=True)
class Lesson:
    """The whole block, what enters it and what should come out of it: what is learned, is learned from this."""

    module: nn.Module
    """The block as the transforms before left it, dense, float32, merged experts taken apart, no inference
    tensors in it. It rounds keys and values, if the run does. To be left as it is."""
    streams: Streams
    """Standing before the block; ``quantised`` is what will enter it."""
    targets: HiddenStates
    """What the block should make of the same samples. To be closed by who asked for them."""


@dataclass(frozen=True)
class Observed:
    """What the calibration samples do in the block as it is."""

    statistics: BlockStatistics
    """Of the inputs of every consumer of a site and every quantised linear; what the method's row asks for."""
    replay: Callable[[Site, int], Replay]
    """(site, tokens) -> the part of the block that the consumers of ``site`` belong to, with what entered it for about
    that many calibration tokens: it computes what comes out for other weights and inputs of these consumers."""
    lesson: Callable[[Sequence[StreamName]], Lesson] | None = None
    """(streams) -> the lesson whose targets are what the block as it is makes of these streams, the mean over them. The
    ``float`` stream is there if ``target`` or ``inputs`` of the method's options is "float"."""


@dataclass(frozen=True)
class Situation:
    """What a transform may look at. Nothing here is to be changed."""

    block: Block
    """Its tensors as the transforms before left them."""
    linears: Collection[str]
    """The linears of the block that will be quantised."""
    scheme: Scheme
    """Of the run; ``weights`` is there. Per linear: ``weights_of``."""
    weights_of: Callable[[str], WeightScheme]
    """Linear -> its weight scheme, symmetry and group size decided."""
    scale_dtype: torch.dtype
    """Of stored weight scales."""
    rounding: str
    """Name of the rounding that follows."""
    seed: int
    observed: Observed | None
    """None for a method that wants neither statistics nor data."""
    kv: AnyKV | None = None
    """How the run keeps keys and values, and whether that is to be learned; None: in full precision."""
    note: Callable[[str], None] = field(default=lambda text: None)
    """Tell the user something about this model, once per run and text."""

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """float32 ``weight`` [rows, columns] of the linear ``name`` as round to nearest leaves it, dequantised.

        What searches judge candidates by: the deployed grid, with the plain range of every group.
        """
        return rtn.quantize(weight, self.weights_of(name), self.scale_dtype, _PLAIN).dequantize()


_PLAIN = rtn.Config(clip="minmax")


@dataclass(frozen=True)
class SiteChange:
    """signal becomes (signal - shift) * scale; the consumers undo it."""

    scale: Tensor | None = None
    """[signal width], positive; None: 1."""
    shift: Tensor | None = None
    """[signal width]; None: 0. Only where ``fold.shift_obstacle`` sees none."""


@dataclass(frozen=True)
class Solution:
    """Numbers for one block. What is left out stays as it is."""

    sites: Mapping[str, SiteChange] = field(default_factory=dict)
    """Site name -> change of its signal, folded into producer and consumers (online where nothing can be folded)."""
    linears: Mapping[str, Tensor] = field(default_factory=dict)
    """Linear name -> t [in_features], positive: its input is multiplied by t at run time, its columns divided."""
    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a v -> o site -> matrix [kv_heads, head_dim, head_dim], or [head_dim, head_dim] for all heads, that its
    signal is multiplied by (from the right); folded into producer and consumer behind ``sites``."""
    ops: Mapping[str, LayerInputs] = field(default_factory=dict)
    """Linear name -> the matrix that its input is multiplied by at run time, behind everything else here: ``signs``,
    ``left`` and ``right``, or ``matrix``, and no other field. What ``online`` announced."""
    query_key: Tensor | None = None
    """t [``block.query_key.width``], positive: queries are multiplied by it, keys divided."""
    limits: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Linear name -> (lowest, highest), each [rows, groups]: weights are clamped to them before they are rounded. In
    the units that the weights have once everything above is applied."""
    clips: Mapping[str, Tensor] = field(default_factory=dict)
    """Linear name -> shares [2] of either end of the range of its input, as ``LayerInputs.clip``, once everything above
    is applied. Linears that read one tensor should have one in common. Dynamic activations only."""
    kv: Mapping[str, LearnedKV] = field(default_factory=dict)
    """Path of an attention -> what was learned about its keys and values, once everything above is applied. Only what
    ``Situation.kv`` says is to be learned."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """JSON-ready lines for the run record, one per site or linear: ``site`` or ``linear``, losses before and after,
    what was chosen."""


def online_sites(sites: Iterable[Site], linears: Collection[str], ops: Collection[InputOp]) -> Online:
    """For transforms of sites: the quantised consumers of sites whose producer can hold nothing."""
    return {name: frozenset(ops) for site in sites if site.kind == "none" for name in site.consumers if name in linears}


def kronecker_left(sites: Iterable[Site], name: str, in_features: int) -> int:
    """Rows of the left factor of a ``kronecker`` matrix for the input of a linear.

    The number of heads where the input is made of heads: what is done within one can be folded into v and o. Else that
    of ``kronecker_split``. 1: the width is prime, or there is one head, and no such matrix is used.
    """
    head_dim = next((site.head_dim for site in sites if site.head_dim and name in site.consumers), 0)
    return in_features // head_dim if head_dim else kronecker_split(in_features)[0]
