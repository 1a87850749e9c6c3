"""What is learned about a block by ``flatquant``: matrices and scales of its inputs, limits of its weights and inputs,
and of keys and values (``keys.py``).

    y = W @ x   becomes   y = ((W / c) @ P**-1) @ (P @ (x * c))        P.T = left (x) right        c: [in_features]

The parameters, where they start, the tensors that the block has with them, and the ``Solution`` that they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online
from quantkit.kernels.reference import fake_quantize
from quantkit.learn.balance import Scaled, balanced_roots
from quantkit.learn.changes import FEWEST_ROWS, Change
from quantkit.learn.fake_quant import LARGEST_START, Clip, InputRounding, round_weight, search_factors
from quantkit.learn.functional import Tensors, fold_matrix, fold_site
from quantkit.learn.keys import caches_of
from quantkit.learn.loop import Group
from quantkit.learn.matrices import Matrix, start_matrix
from quantkit.learn.places import Place, PlaceParameters, places
from quantkit.models.block import Site
from quantkit.quantizers.grid import group_count
from quantkit.transforms.interface import Lesson, Observed, SiteChange, Situation, Solution, kronecker_left
from quantkit.transforms.smoothquant import smoothing_scale

if TYPE_CHECKING:
    from quantkit.transforms.flatquant import Config

_LARGEST = 1e4
"""Bound of the scales to start with; keeps norms and weights inside float16."""
_SHARES = tuple(1 - step / 20 for step in range(11))
"""Of an input's range, tried as a start: 1, 0.95 .. 0.5."""

_MOST_ROWS = 4096
"""Inputs that starts are judged by; of the experts of a block together."""

_KEPT = 1 << 24
"""Weights of a block up to which what changes them is kept for the way back: 0.3 GB."""

Kind = Literal["weights", "inputs", "cache"]


class FlatBlock:
    """Everything that is learned about a block, and what becomes of the block's tensors with it."""

    def __init__(self, situation: Situation, config: Config, observed: Observed, lesson: Lesson) -> None:
        self._situation, self._config, self._statistics = situation, config, observed.statistics
        self._base = {name: tensor.detach() for name, tensor in lesson.module.named_parameters()}
        # What an earlier transform does to their input at run time stands between the values and the weight.
        self._touched = {name for name in situation.linears if lesson.module.get_submodule(name)._forward_pre_hooks}
        activations = situation.scheme.activations
        self._dynamic = activations is not None and activations.dynamic
        self.inputs: dict[str, InputRounding] = {}
        """Linear -> what is done to its input; the linears of a place have it in common."""
        self._places = [self._start_of(place) for place in places(situation.block.sites, situation.linears)]
        wanted = config.keys and situation.kv is not None and situation.kv.learned_clips
        self._caches = caches_of(lesson.module, self._matrices_of) if wanted else []
        self._clips: dict[str, Clip] = {}
        clipped = config.weight_clip and situation.rounding == "rtn"
        for name in filter(self._seen, situation.linears if clipped else ()):
            scheme = situation.weights_of(name)
            rows, columns = self._base[f"{name}.weight"].shape
            wide = torch.ones(1 if scheme.is_symmetric else 2, rows, group_count(columns, scheme.group_size))
            self._clips[name] = Clip(wide, scheme, situation.scale_dtype)

    # --- start -------------------------------------------------------------------------------------------------------

    def _seen(self, name: str) -> bool:
        """Did enough calibration tokens reach the linear to conclude anything?"""
        return len(self._statistics.inputs[name].rows) >= FEWEST_ROWS

    def _start_of(self, place: Place) -> PlaceParameters:
        config, activations = self._config, self._situation.scheme.activations
        own = PlaceParameters(place, InputRounding(activations))
        self.inputs |= {name: own.hook for site in place.sites for name in site.consumers}
        if not any(self._seen(name) for name in place.linears):
            return own
        if config.diagonal:
            seen = [site for site in place.sites if len(self._statistics.of_site(site).rows) >= FEWEST_ROWS]
            own.changes = [self._scale_of(site) for site in seen if not site.head_dim]
        if config.matrices:
            self._start_matrices(own)
        if config.activation_clip and self._dynamic:
            own.shares = nn.Parameter(torch.full((2,), LARGEST_START).logit())
        return own

    def _start_matrices(self, own: PlaceParameters) -> None:
        place, matrix = own.place, self._matrices_of(own.place.label)
        width = self._base[f"{place.linears[0]}.weight"].shape[1]
        left = kronecker_left(place.sites, place.linears[0], width)
        own.right_width = width // left
        site = place.sites[0]
        if site.head_dim:
            # Rounding of a weight that is stored as it stands could not be made up for.
            both = {site.producer, *site.consumers}
            if both <= set(self._situation.linears) and not self._touched & set(site.consumers):
                own.value = matrix(site.head_dim, width // site.repeats // site.head_dim)
            elif left > 1:
                own.right = matrix(site.head_dim)
            own.left = matrix(left) if left > 1 else None
        elif left > 1:
            roots = self._balanced(own, left) if self._config.matrix_start == "balanced" else (None, None)
            own.left, own.right = matrix(left, root=roots[0]), matrix(width // left, root=roots[1])
        else:
            self._situation.note(f"flatquant: {place.label} has {width} channels, a prime: they are scaled, not mixed.")

    def _balanced(self, own: PlaceParameters, left: int) -> tuple[Tensor, Tensor]:
        """``balanced_roots`` of a place that has scales alone so far."""
        weights: list[Scaled] = []
        for site in own.place.sites:
            scale = next((change.values()[0].detach() for change in own.changes if change.site is site), 1.0)
            weights += [(self._base[f"{name}.weight"], scale) for name in site.consumers if name in own.place.linears]
        return balanced_roots([(self._rows_of(own).detach(), 1.0)], weights, left)

    def _rows_of(self, own: PlaceParameters) -> Tensor:
        """Inputs of a place from calibration, [rows, columns], behind all that is done to them but the rounding."""
        most = -(-_MOST_ROWS // len(own.place.sites))
        inputs = [(self._statistics.of_site(site).rows[:most], site.consumers[0]) for site in own.place.sites]
        return torch.cat([own.changed(x, name) for x, name in inputs])

    def _matrices_of(self, label: str) -> Callable[..., Matrix]:
        """A function (size, heads = 1, root = None) that draws one matrix after the other for ``label``."""
        config, situation = self._config, self._situation
        seed = zlib.crc32(f"{situation.seed} {situation.block.index} {label}".encode())
        generator = torch.Generator().manual_seed(seed)

        def matrix(size: int, heads: int = 1, root: Tensor | None = None) -> Matrix:
            starts = [start_matrix(config.matrix_start, size, generator) for _ in range(heads)]
            return Matrix(torch.stack(starts), config.parameterisation, root)

        return matrix

    def _scale_of(self, site: Site) -> Change:
        """c to start with; half of the channels have more than 1."""
        config = self._config
        names = [name for name in site.consumers if name in self._situation.linears]
        weights = [self._base[f"{name}.weight"] for name in names]
        seen = self._statistics.of_site(site)
        if config.diag_start == "rms":  # the least product of both errors, if these were spread evenly
            energy = torch.stack([weight.square().sum(0) for weight in weights]).sum(0)
            own = (energy / sum(len(weight) for weight in weights)).sqrt()
            found = smoothing_scale(seen.rows.square().mean(0).sqrt(), own, 0.5).reciprocal()
        elif config.diag_start == "smoothquant":
            own = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            found = smoothing_scale(seen.absmax, own, config.alpha).reciprocal()
        else:
            found = torch.ones(weights[0].shape[1])
        found = (found / found.median()).clamp(1 / _LARGEST, _LARGEST)
        free = torch.ones(len(found), dtype=torch.bool)
        if site.kind == "norm":  # a gain of 0 has no scale
            free = self._base[f"{site.producer}.weight"] + site.norm_offset != 0
        return Change(site, found, None, torch.ones_like(found), free)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The limits that there may be."""
        return ("weights", "inputs", "cache") if self._caches else ("weights", "inputs")

    def start_limits(self, kind: Kind, share: float) -> None:
        """Put the limits of all weights or inputs, or of keys and values, where a search has them, or a ``share`` of
        the way there."""
        if kind == "cache":
            for cache in self._caches:
                cache.start_shares(share)
            return
        with torch.no_grad():
            if kind == "weights":
                for name, clip in self._clips.items():
                    clip.restart(1 - share * (1 - self._searched_factors[name]))
                return
            for own, found in zip(self._places, self._searched_shares, strict=True):
                if own.shares is not None:
                    kept = 1 - share * (1 - found)
                    own.shares.copy_(torch.full((2,), kept).clamp(max=LARGEST_START).logit())

    @cached_property
    def _searched_factors(self) -> dict[str, Tensor]:
        """Linear -> factors that suit its weights as they are before the first step."""
        tensors, found = self._transformed(), {}
        for own in self._places:
            for name in self._clips.keys() & own.place.linears:
                rows = own.changed(self._statistics.inputs[name].rows, name)
                scheme, dtype = self._situation.weights_of(name), self._situation.scale_dtype
                found[name] = search_factors(tensors[f"{name}.weight"], scheme, dtype, rows.square().mean(0))
        return found

    @cached_property
    def _searched_shares(self) -> list[float]:
        """Per place, the share of both ends of a range that suits its input as it is before the first step."""
        tensors = self._transformed()
        return [1.0 if own.shares is None else self._search_share(own, tensors) for own in self._places]

    def _search_share(self, own: PlaceParameters, tensors: Tensors) -> float:
        activations = self._situation.scheme.activations
        assert activations is not None
        rows = self._rows_of(own)
        energy = torch.stack([tensors[f"{name}.weight"].square().sum(0) for name in own.place.linears]).sum(0)

        def error(share: float) -> float:
            wrong = fake_quantize(rows, activations, clip=torch.full((2,), share)) - rows
            return float((wrong.square() * energy).sum(dtype=torch.float64))

        return min(_SHARES, key=error)

    # --- use ---------------------------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        config = self._config
        shares = [own.shares for own in self._places if own.shares is not None]
        limits = [clip.logits for clip in self._clips.values()]
        matrices = [parameter for own in self._places for parameter in own.parameters()]
        for cache in self._caches:
            shares.append(cache.shares)
            matrices += [] if cache.matrix is None else cache.matrix.parameters()
        return [Group("flat", matrices, config.lr), Group("clip", [*limits, *shares], config.lr_clip)]

    def tensors(self) -> Tensors:
        """What takes the place of the block's tensors, with gradients; sets what is done to inputs, keys and values as
        well."""
        device = next(iter(self._base.values())).device.type
        with torch.autocast(device, enabled=False):  # a matrix and its inverse belong together to float32
            tensors, undoings = self._folded()
            for cache in self._caches:
                cache.use()
            large = sum(tensors[f"{name}.weight"].numel() for name in undoings) > _KEPT
            for name, undo in undoings.items():
                met, weight = partial(self._met, name, undo=undo), tensors[f"{name}.weight"]
                if large:  # computed once more on the way back: what the steps leave is many times the weight
                    met = partial(checkpoint, met, use_reentrant=False, preserve_rng_state=False)
                tensors[f"{name}.weight"] = met(weight)
        return {name: tensor for name, tensor in tensors.items() if tensor is not self._base[name]}

    def _met(self, name: str, weight: Tensor, undo: LayerInputs) -> Tensor:
        """The weight of a linear as it meets its input, limited and rounded."""
        weight, clip = online.apply(weight, undo), self._clips.get(name)
        return self._rounded(name, weight) if clip is None else clip(weight)

    def plain_tensors(self) -> Tensors:
        """The weights rounded to nearest, nothing else changed."""
        self.leave()
        for hook in self.inputs.values():
            hook.scale, hook.op, hook.clip = None, LayerInputs(), None
        names = [f"{name}.weight" for name in self._situation.linears]
        return {name: self._rounded(name.removesuffix(".weight"), self._base[name]) for name in names}

    def leave(self) -> None:
        """Make the lesson's module keep keys and values as it did before anything was learned."""
        for cache in self._caches:
            cache.leave()

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        return round_weight(weight, self._situation.weights_of(name), self._situation.scale_dtype)

    def _transformed(self) -> Tensors:
        """All tensors of the block before anything is rounded."""
        tensors, undoings = self._folded()
        for name, undo in undoings.items():
            tensors[f"{name}.weight"] = online.apply(tensors[f"{name}.weight"], undo)
        return tensors

    def _folded(self) -> tuple[Tensors, dict[str, LayerInputs]]:
        """The tensors of the block with all that is folded, and what the rows of the weight of every quantised linear
        are still multiplied by; sets what is done to inputs. Every matrix is inverted once."""
        tensors = dict(self._base)
        undoings: dict[str, LayerInputs] = {}
        for own in self._places:
            for site, scale in own.scales():
                consumers = site.consumers
                if site.kind == "none":
                    consumers = own.place.linears
                    own.hook.scale = scale
                fold_site(tensors, site, scale, None, consumers)
            if own.value is not None:
                fold_matrix(tensors, own.place.sites[0], *own.value())
        for own in self._places:
            own.hook.op, undo = own.ops()
            undoings |= dict.fromkeys(own.place.linears, undo)
            # Ranges have gradients only where they are clipped, if it be to all of them.
            own.hook.clip = torch.ones(2) if self._dynamic and own.shares is None else own.clip()
        return tensors, undoings

    def solution(self, fact: Mapping[str, Any]) -> Solution:
        """What was learned."""
        facts = [dict(fact)]
        known = {site.name for site in self._situation.block.sites}
        scales: dict[str, Tensor] = {}
        matrices: dict[str, Tensor] = {}
        ops: dict[str, LayerInputs] = {}
        clips: dict[str, Tensor] = {}
        limits: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            for own in self._places:
                scales |= {site.name: scale for site, scale in own.scales()}
                if own.value is not None:
                    matrices[own.place.sites[0].name] = own.value()[0].detach().clone()
                if own.left is not None:
                    ops |= dict.fromkeys(own.place.linears, own.run_time_op())
                if own.shares is not None:
                    clips |= dict.fromkeys(own.place.linears, own.shares.sigmoid())
                facts.append({"site": own.place.label, **own.facts()})
            tensors = self._transformed()
            for name, clip in self._clips.items():
                low, high = clip.ends(tensors[f"{name}.weight"])
                limits[name] = low, high
                facts.append({"linear": name, "limit_mean": float(clip.logits.sigmoid().mean())})
        facts += [{"attention": cache.path, **cache.facts()} for cache in self._caches]
        return Solution(
            sites={name: SiteChange(scale) for name, scale in scales.items() if name in known},
            linears={name: scale for name, scale in scales.items() if name not in known},
            matrices=matrices,
            ops=ops,
            clips=clips,
            limits=limits,
            kv={cache.path: cache.learned() for cache in self._caches},
            facts=facts,
        )
