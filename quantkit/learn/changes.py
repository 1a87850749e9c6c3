"""What is learned about a block by ``omniquant``: changes of its signals and limits of its weights.

The parameters, where they start, the tensors that the block has with them, and the ``Solution`` that they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.learn.fake_quant import Clip, InputRounding, round_weight, search_factors
from quantkit.learn.functional import Tensors, fold_query_key, fold_site
from quantkit.learn.loop import Group
from quantkit.models.block import QueryKey, Site
from quantkit.quantizers.grid import group_count
from quantkit.transforms.fold import consumer_columns, shift_obstacle
from quantkit.transforms.interface import Lesson, Observed, SiteChange, Situation, Solution
from quantkit.transforms.smoothquant import smoothing_scale

if TYPE_CHECKING:
    from quantkit.calibrate.statistics import InputStatistics
    from quantkit.transforms.omniquant import Config

FEWEST_ROWS = 32
"""Inputs from which anything is concluded about a signal. Experts may see fewer."""
_LARGEST = 1e4
"""Bound of the scales to start with; keeps norms and weights inside float16."""
_TAIL = 0.01
"""Shifts start in the middle between the quantile of so much and that of the rest: few extreme tokens do not count."""


class Change(nn.Module):
    """t and z of one signal."""

    def __init__(self, site: Site, scale: Tensor, shift: Tensor | None, unit: Tensor, free: Tensor) -> None:
        """
        Args:
            scale: [width], t to start with.
            shift: [width], z to start with; None: there is none.
            unit: [width], what a step of z is a share of.
            free: [width] bool: False where t stays 1.
        """
        super().__init__()
        self.site = site
        self._unit = torch.where(unit > 0, unit, 1.0)
        self._free = free
        self.log_scale = nn.Parameter(scale.log().where(free, 0.0))
        self.shift = None if shift is None else nn.Parameter(shift / self._unit)

    def values(self) -> tuple[Tensor, Tensor | None]:
        """(t, z), [width]."""
        t = self.log_scale.where(self._free, 0.0).exp()
        return t, None if self.shift is None else self.shift * self._unit


class BlockChanges:
    """Everything that is learned about a block, and what becomes of the block's tensors with it."""

    def __init__(self, situation: Situation, config: Config, observed: Observed, lesson: Lesson) -> None:
        self._situation, self._config = situation, config
        base = self._base = {name: tensor.detach() for name, tensor in lesson.module.named_parameters()}
        # An earlier transform changes their input at run time: no shift is folded there.
        touched = {name for name in situation.linears if lesson.module.get_submodule(name)._forward_pre_hooks}
        self._statistics = observed.statistics
        block, activations = situation.block, situation.scheme.activations
        self._changes: dict[str, Change] = {}
        if config.changes_signals(activations is not None):
            found = {site.name: self._start_of(site, touched) for site in block.sites}
            self._changes = {name: change for name, change in found.items() if change is not None}
        pair = block.query_key
        self._pair: QueryKey | None = pair if config.query_key and pair and not pair.norm_offset else None
        self._query_key = nn.Parameter(torch.zeros(self._pair.width)) if self._pair else None
        self.inputs = self._input_hooks()
        """Linear -> what rounds its input; the linears that read one site have it in common."""
        self._factors: dict[str, Tensor] = {}  # linear -> what the search for its limits found
        self._clips: dict[str, Clip] = {}
        for name in filter(self._seen, situation.linears if config.clip and situation.rounding == "rtn" else ()):
            scheme = situation.weights_of(name)
            rows, columns = base[f"{name}.weight"].shape
            wide = torch.ones(1 if scheme.is_symmetric else 2, rows, group_count(columns, scheme.group_size))
            self._clips[name] = Clip(wide, scheme, situation.scale_dtype)

    # --- start -------------------------------------------------------------------------------------------------------

    def _seen(self, name: str) -> bool:
        """Did enough calibration tokens reach the linear to conclude anything?"""
        return len(self._statistics.inputs[name].rows) >= FEWEST_ROWS

    def _start_of(self, site: Site, touched: Collection[str]) -> Change | None:
        """SmoothQuant's scale, and a shift to the middle of most values; None where nothing shall be changed."""
        situation, config = self._situation, self._config
        names = [name for name in site.consumers if name in situation.linears]
        if not names or len(self._statistics.of_site(site).rows) < FEWEST_ROWS:
            return None
        shifts = config.shift == "auto" and shift_obstacle(situation.block, site) is None
        shifts &= site.kind == "none" or not any(name in touched for name in names)
        weights = [self._base[f"{name}.weight"] for name in names]
        z, reach, weight = _signal(site, self._statistics.of_site(site), weights, shifts)
        s = smoothing_scale(reach, weight, config.alpha).clamp(1 / _LARGEST, _LARGEST)
        free = torch.ones(len(s), dtype=torch.bool)
        if site.kind == "norm":  # a gain of 0 has no scale
            free = self._base[f"{site.producer}.weight"] + site.norm_offset != 0
        return Change(site, s.reciprocal(), z if shifts else None, reach, free)

    def kinds(self) -> list[list[str]]:
        """The linears with limits, those of all experts that do the same together."""
        kinds: dict[str, list[str]] = {}
        for name in self._clips:
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        return list(kinds.values())

    def start_limits(self, names: Collection[str], share: float) -> None:
        """Put limits where the search has them, or only a ``share`` of the way there from the whole range.

        The search is for the weights as they are before the first step.
        """
        missing = [name for name in names if name not in self._factors]
        with torch.no_grad():
            tensors = self._folded() if missing else {}
            for name in missing:
                importance = self._statistics.inputs[name].rows.square().mean(0) * self._columns(name).square()
                scheme, dtype = self._situation.weights_of(name), self._situation.scale_dtype
                self._factors[name] = search_factors(tensors[f"{name}.weight"], scheme, dtype, importance)
            for name in names:
                self._clips[name].restart(1 - share * (1 - self._factors[name]))

    def _columns(self, name: str) -> Tensor:
        """What the input of a linear is multiplied by at the start, [columns] or [1]."""
        for change in self._changes.values():
            if name in change.site.consumers:
                return consumer_columns(change.site, change.values()[0])
        return torch.ones(1)

    def _input_hooks(self) -> dict[str, InputRounding]:
        activations, linears = self._situation.scheme.activations, self._situation.linears
        hooks: dict[str, InputRounding] = {}
        for site in self._situation.block.sites:
            if activations is not None or (site.kind == "none" and site.name in self._changes):
                hooks |= dict.fromkeys(site.consumers, InputRounding(activations))
        if activations is not None:
            hooks |= {name: InputRounding(activations) for name in linears if name not in hooks}
        return hooks

    def begin_epoch(self, epoch: int, epochs: int) -> bool:
        """As ``loop.BeginEpoch``: everything learns from the first step."""
        return True

    # --- use ---------------------------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        own = [] if self._query_key is None else [self._query_key]
        signals = [parameter for change in self._changes.values() for parameter in change.parameters()] + own
        limits = [clip.logits for clip in self._clips.values()]
        return [Group("let", signals, self._config.lr_let), Group("clip", limits, self._config.lr_clip)]

    def tensors(self) -> Tensors:
        """What takes the place of the block's tensors, with gradients; sets what is done to inputs as well."""
        device = next(iter(self._base.values())).device.type
        with torch.autocast(device, enabled=False):  # sums of weights and shifts are exact to float32
            tensors = self._folded()
            for name in self._situation.linears:
                weight, clip = tensors[f"{name}.weight"], self._clips.get(name)
                tensors[f"{name}.weight"] = self._rounded(name, weight) if clip is None else clip(weight)
        return {name: tensor for name, tensor in tensors.items() if tensor is not self._base[name]}

    def plain_tensors(self) -> Tensors:
        """The weights rounded to nearest, nothing else changed."""
        for hook in self.inputs.values():
            hook.scale = hook.shift = None
        names = [f"{name}.weight" for name in self._situation.linears]
        return {name: self._rounded(name.removesuffix(".weight"), self._base[name]) for name in names}

    def solution(self, fact: Mapping[str, Any]) -> Solution:
        """What was learned."""
        sites, limits, facts = {}, {}, [dict(fact)]
        with torch.no_grad():
            for name, change in self._changes.items():
                t, z = change.values()
                sites[name] = SiteChange(t, z)
                facts.append({"site": name, "scale_min": float(t.min()), "scale_max": float(t.max())})
            tensors = self._folded()
            for name, clip in self._clips.items():
                low, high = clip.ends(tensors[f"{name}.weight"])
                limits[name] = low, high
                facts.append({"linear": name, "limit_mean": float(clip.logits.sigmoid().mean())})
            query_key = None if self._query_key is None else self._powers()
        return Solution(sites, query_key=query_key, limits=limits, facts=facts)

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        return round_weight(weight, self._situation.weights_of(name), self._situation.scale_dtype)

    def _folded(self) -> Tensors:
        """All tensors of the block with the changes of signals, before anything is rounded."""
        tensors = dict(self._base)
        for site in self._situation.block.sites:
            if site.name not in self._changes:
                continue
            t, z = self._changes[site.name].values()
            consumers = site.consumers
            if site.kind == "none":
                consumers = tuple(name for name in consumers if name in self._situation.linears)
                self.inputs[consumers[0]].scale, self.inputs[consumers[0]].shift = t, z
            fold_site(tensors, site, t, z, consumers)
        if self._pair is not None:
            fold_query_key(tensors, self._pair, self._powers())
        return tensors

    def _powers(self) -> Tensor:
        """t of queries and keys, [width]: powers of two, so that norms and biases hold it exactly."""
        assert self._query_key is not None
        exponent = self._query_key
        return (exponent + (exponent.round() - exponent).detach()).exp2()


def _signal(
    site: Site, seen: InputStatistics, weights: Sequence[Tensor], shifts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The middle z of most values of a signal (0 without ``shifts``), max|x - z|, and max|W|; [signal width] each.

    Args:
        seen: of the input of the consumers, with ``range`` and ``rows``.
        weights: [rows_i, columns] of the consumers that are rounded.
    """
    z = torch.zeros_like(_by_head(site, seen.minimum)[0])
    if shifts:
        z = _by_head(site, seen.channel_quantile(_TAIL) + seen.channel_quantile(1 - _TAIL)).mean(0) / 2
    low, high = _by_head(site, seen.minimum).amin(0), _by_head(site, seen.maximum).amax(0)
    weight = _by_head(site, torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)).amax(0)
    return z, torch.maximum(high - z, z - low), weight


def _by_head(site: Site, columns: Tensor) -> Tensor:
    """A value per input column of the consumers as [heads that read one channel of the signal, signal width]."""
    if site.repeats == 1:
        return columns[None]
    return columns.unflatten(0, (-1, site.repeats, site.head_dim)).movedim(1, 0).flatten(1)
