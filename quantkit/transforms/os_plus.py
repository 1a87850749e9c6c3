"""Outlier Suppression+ (Wei et al., arXiv 2304.09145): shift and scale channels until activations round well.

    y = W @ x + b   becomes   y = (W * s) @ ((x - z) / s) + (b + W @ z)        z, s: [in_features], s > 0

z and s are chosen together, per signal, by the error of the output with rounded weights and activations (eq. 8) of the
attention module or MLP that reads the signal, or of the linear itself. Candidates for s, with m = max|x - z|:

    threshold   s = max(1, m / t)                      eq. 7: what exceeds t is brought down to it
    smooth      s = m**alpha / max|W|**(1 - alpha)     SmoothQuant's
    mean        s = mean|x - z|**r                     AWQ's: not decided by single tokens

Candidates for z: 0, mean, median, the middle between the 1st and 99th percentile, the middle of the range (eq. 5). The
middle of the range alone is the paper's; it is best for one grid per tensor and can hurt with one per token, where few
extreme tokens must not move all others. A shift needs a bias on both sides: without one there is the scale alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.calibrate.ranges import static_range
from quantkit.calibrate.replay import Substitute
from quantkit.calibrate.statistics import InputStatistics
from quantkit.kernels.reference import fake_quantize
from quantkit.models.block import Block, Site
from quantkit.transforms.fold import consumer_columns, shift_obstacle
from quantkit.transforms.interface import InputOp, Observed, Online, SiteChange, Situation, Solution, online_sites
from quantkit.transforms.os_plus_candidates import Candidate, Form, ShiftKind, Signal

_FEWEST_ROWS = 32
"""Inputs from which anything is concluded about a signal. Experts may see fewer."""
_SCREENED_ROWS = 1024
"""Output rows that screening looks at, over all linears of a site."""
_FINALISTS = 2
"""Kinds of shift and form whose grids are gone through: what screening likes best need not be best."""


class Config(BaseModel, frozen=True, extra="forbid"):
    """Options of ``os-plus``."""

    preset: Literal["recommended", "faithful"] = Field(
        "recommended",
        description="faithful: the authors' search: shift to the middle of the range, 100 or more evenly spaced "
        "thresholds, only inputs of attention and MLPs and, where norms have no biases, of down projections",
    )
    shift: Literal["auto", "never"] = Field("auto", description="auto: wherever there are biases that can hold it")
    search_tokens: int = Field(2048, ge=1, description="calibration tokens that judge a candidate")
    candidates: int = Field(
        32,
        ge=1,
        description="recommended: candidates per site that the output of attention or MLP decides between, chosen by "
        "the outputs of linears on few tokens; up to 16 more around the best of them are tried in the end",
    )


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    ops: set[InputOp] = {"scale", "shift"} if config.shift == "auto" else {"scale"}
    return online_sites(sites, linears, ops)


def solve(situation: Situation, config: Config) -> Solution:
    """Shift and scale of the signals of a block. Where nothing is better than leaving a signal alone, it is."""
    observed, block = situation.observed, situation.block
    assert observed is not None
    changes, facts = {}, []
    for site in block.sites:
        names = [name for name in site.consumers if name in situation.linears]
        if not names or (config.preset == "faithful" and not _released(block, site)):
            continue
        if len(observed.statistics.of_site(site).rows) < _FEWEST_ROWS:
            situation.note(f"os-plus leaves inputs alone that fewer than {_FEWEST_ROWS} calibration tokens reach.")
            continue
        obstacle = shift_obstacle(block, site)
        if obstacle and config.shift == "auto":
            obstacle = re.sub(r"\d+", "*", obstacle)  # of experts: said once
            situation.note(f"os-plus scales without a shift where one cannot be folded: {obstacle}.")
        search = _Search(situation, observed, site, names, config, shift=config.shift == "auto" and not obstacle)
        before, loss, best = search.run()
        signal = search.signal
        z, s = signal.shifts[best.shift], signal.scale(best)
        facts.append({"site": site.name, "loss_before": before, "loss": loss, **_described(best, s)})
        scale, shift = bool((s != 1).any()), bool((z != 0).any())
        if scale or shift:
            changes[site.name] = SiteChange(s.double().reciprocal() if scale else None, z if shift else None)
    return Solution(changes, facts=facts)


def _described(best: Candidate, s: Tensor) -> dict[str, Any]:
    parameter = {"threshold": "threshold", "smooth": "alpha", "mean": "r"}[best.form]
    return {"shift": best.shift, parameter: best.value, "scale_min": float(s.min()), "scale_max": float(s.max())}


def _released(block: Block, site: Site) -> bool:
    """Does the authors' code transform this signal?"""
    return site.kind != "linear" or not (site.head_dim or _layer_norms(block))


def _layer_norms(block: Block) -> bool:
    """Do the norms of the block have biases?"""
    norms = (name for name, tensor in block.tensors.items() if name.endswith(".weight") and tensor.dim() == 1)
    return any(f"{name.removesuffix('.weight')}.bias" in block.tensors for name in norms)


class _Sample(NamedTuple):
    """Inputs and some output rows of a linear, to screen candidates with."""

    seen: InputStatistics
    inputs: Tensor
    """[tokens, columns]"""
    weight: Tensor
    """[rows, columns]"""
    expected: Tensor
    """[tokens, rows]"""


class _Search:
    """The shift and scale of one signal."""

    def __init__(
        self, situation: Situation, observed: Observed, site: Site, names: Sequence[str], config: Config, shift: bool
    ) -> None:
        self._situation, self._site, self._names, self._config = situation, site, names, config
        self._inputs = {name: observed.statistics.inputs[name] for name in names}
        self._replay = observed.replay(site, config.search_tokens)
        kinds: tuple[ShiftKind, ...] = ("none",)
        if shift:
            recommended = config.preset == "recommended"
            kinds = ("none", "mean", "median", "percentiles", "midrange") if recommended else ("none", "midrange")
        self._ends = {id(seen): (seen.minimum, seen.maximum) for seen in self._inputs.values()}
        if self._per_tensor:
            self._widen_ends()
        whole = observed.statistics.of_site(site)
        low, high = zip((whole.minimum, whole.maximum), *self._ends.values(), strict=True)
        ends = torch.stack(low).amin(0), torch.stack(high).amax(0)
        weights = [situation.block.weight(name) for name in names]
        self.signal = Signal(site, whole, ends, weights, kinds)

    def run(self) -> tuple[float, float, Candidate]:
        """(loss of the identity, loss of the best candidate, the best candidate); ties go to the earlier one."""
        signal = self.signal
        identity = signal.largest("none")
        losses = self._judged([identity])
        before = losses[identity]
        if self._config.preset == "faithful":
            lowest = 1.0 if _layer_norms(self._situation.block) else 0.1
            losses = self._judged(signal.released(list(signal.shifts)[-1], lowest))
        else:
            self._go_through(signal.candidates()[1:], losses)
        best = min(losses, key=losses.__getitem__)
        return before, losses[best], best

    def _go_through(self, candidates: list[Candidate], losses: dict[Candidate, float]) -> None:
        """Add to ``losses`` those of the most promising ``candidates`` and of some between them.

        Where there are too many, the best of each kind by screening are judged, then the grids of the best kinds.
        """
        limit = self._config.candidates
        if len(candidates) > limit:
            samples = self._samples()
            screened = {candidate: self._screen(candidate, samples) for candidate in candidates}
            ordered = sorted(candidates, key=screened.__getitem__)
            first = {candidate.kind: candidate for candidate in reversed(ordered)}
            tried = [candidate for candidate in ordered if candidate in first.values()][:limit]
            losses |= self._judged(tried)
            leading = {candidate.kind for candidate in _leading(losses)}
            rest = [candidate for candidate in ordered if candidate.kind in leading and candidate not in losses]
            candidates = rest[: limit - len(tried)]
        losses |= self._judged(candidates)
        for candidate in _leading(losses):
            losses |= self._judged(self.signal.near(candidate))

    def _samples(self) -> dict[str, _Sample]:
        samples = {}
        for name, seen in self._inputs.items():
            weight, inputs = self._situation.block.weight(name), seen.rows
            weight = weight[:: -(-len(weight) * len(self._names) // _SCREENED_ROWS)]
            samples[name] = _Sample(seen, inputs, weight, inputs @ weight.t())
        return samples

    def _screen(self, candidate: Candidate, samples: dict[str, _Sample]) -> float:
        """Mean over the linears of the squared error of their outputs, over that of the outputs."""
        z, s = self._columns(candidate)
        changed: dict[int, Tensor] = {}
        total = 0.0
        for name, sample in samples.items():
            size = float(sample.expected.square().sum(dtype=torch.float64))
            if not size:
                continue
            if id(sample.seen) not in changed:
                change = self._change(sample.seen, z, s, fixed=self._per_tensor)
                changed[id(sample.seen)] = change(sample.inputs)
            output = changed[id(sample.seen)] @ self._situation.rounded(name, sample.weight * s).t()
            error = output.add_(sample.weight @ z).sub_(sample.expected).square_().sum(dtype=torch.float64)
            total += float(error) / size
        return total if total == total else float("inf")

    def _judged(self, candidates: Iterable[Candidate]) -> dict[Candidate, float]:
        """Losses: squared error of what comes out of the part around the signal, over its square."""
        return {candidate: self._loss(candidate) for candidate in candidates}

    def _loss(self, candidate: Candidate) -> float:
        z, s = self._columns(candidate)
        changes = {id(seen): self._change(seen, z, s) for seen in self._inputs.values()}
        substitutes = {}
        for name, seen in self._inputs.items():
            weight, bias = self._situation.block.weight(name), self._situation.block.tensors.get(f"{name}.bias")
            rounded = self._situation.rounded(name, weight * s)
            substitutes[name] = Substitute(rounded, None if bias is None else bias + weight @ z, changes[id(seen)])
        return self._replay.error(substitutes)

    def _columns(self, candidate: Candidate) -> tuple[Tensor, Tensor]:
        """z and s [columns]."""
        z, s = self.signal.shifts[candidate.shift], self.signal.scale(candidate)
        return consumer_columns(self._site, z), consumer_columns(self._site, s)

    def _change(self, seen: InputStatistics, z: Tensor, s: Tensor, fixed: bool = False) -> Callable[[Tensor], Tensor]:
        """What the input meets the weights as: shifted, scaled, rounded as at run time.

        Args:
            fixed: on a grid for all that the input is known to be, as dynamic ones are not.
        """
        activations = self._situation.scheme.activations
        if activations is None:
            return lambda x: (x - z) / s
        if activations.dynamic and not fixed:
            return lambda x: fake_quantize((x - z) / s, activations)
        inputs = seen.rows if activations.quantile < 1 else torch.stack(self._ends[id(seen)])
        after = InputStatistics(len(s), ("range", "tokens"))
        after.update((inputs - z) / s, tokens=torch.arange(len(inputs)), keys=torch.zeros(len(inputs)))
        grid = static_range(after, activations, self._situation.scale_dtype)
        return lambda x: fake_quantize((x - z) / s, activations, *grid)

    @property
    def _per_tensor(self) -> bool:
        activations = self._situation.scheme.activations
        return activations is not None and activations.granularity == "tensor"

    def _widen_ends(self) -> None:
        """Take in the first tokens of samples: the statistics leave them out, a grid for all tokens cannot."""
        block = self._situation.block

        def record(key: int, x: Tensor) -> Tensor:
            if x.numel():
                low, high = torch.aminmax(x.flatten(0, -2), dim=0)
                self._ends[key] = torch.minimum(low, self._ends[key][0]), torch.maximum(high, self._ends[key][1])
            return x

        recorded = {
            name: Substitute(block.weight(name), block.tensors.get(f"{name}.bias"), partial(record, id(seen)))
            for name, seen in self._inputs.items()
        }
        for _ in self._replay.outputs(recorded):
            pass


def _leading(losses: Mapping[Candidate, float]) -> list[Candidate]:
    """The best candidates of the best kinds."""
    best: dict[tuple[ShiftKind, Form], Candidate] = {}
    for candidate in sorted(losses, key=losses.__getitem__):
        best.setdefault(candidate.kind, candidate)
    return list(best.values())[:_FINALISTS]
