"""What a run will do, before any weight is read: per layer, in what format, how large, and what can load it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from quantkit.errors import RecipeError
from quantkit.formats.config import portable_reason
from quantkit.formats.kv import AnyKV, KVFormat, kv_of
from quantkit.formats.layer import InputOp, LayerFormat, stored_bytes
from quantkit.kv.attach import attentions, key_dim, why_not
from quantkit.recipe import PER_CHANNEL, Calibration, Recipe, WeightScheme
from quantkit.steps import BoundStep, Steps, bind_steps
from quantkit.transforms.interface import kronecker_left

if TYPE_CHECKING:
    from quantkit.calibrate.streams import StreamName
    from quantkit.models.checkpoint import Checkpoint
    from quantkit.models.skeleton import Skeleton

_MATRICES: tuple[InputOp, ...] = ("hadamard", "kronecker", "dense")


@dataclass(frozen=True)
class LayerPlan:
    """One linear of the decoder blocks."""

    name: str
    out_features: int
    in_features: int
    format: LayerFormat | None
    """None: stays in full precision, for ``reason``."""
    reason: str
    stored_bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole run; ``layers`` in model order."""

    recipe: Recipe
    source: Path
    layers: tuple[LayerPlan, ...]
    steps: Steps
    format: Literal["compressed-tensors", "quantkit"]
    format_reason: str
    scale_dtype: torch.dtype
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    notes: tuple[str, ...]
    calibration: Calibration | None
    """Fitted to the model; None: neither a method of the run nor a static activation scale looks at data."""
    kv: AnyKV | None = None
    """How the model keeps keys and values; None: in full precision."""
    residual: str = ""
    """How the residual stream of the whole model is changed before the first step; empty: it is not."""

    @property
    def loads_in(self) -> str:
        if self.format == "quantkit":
            return "quantkit (quantkit.load, or transformers after `import quantkit`)"
        return "transformers with compressed-tensors >= 0.15, vLLM, and quantkit"

    @property
    def streams(self) -> tuple[StreamName, ...]:
        """The hidden states that calibration carries."""
        return ("float", "quantised") if self.steps.wants_float_stream else ("quantised",)

    def layer(self, name: str) -> LayerPlan:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}

    def describe(self) -> dict[str, Any]:
        """The plan as JSON, for ``--dry-run --json`` and the run record."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "scheme": self.recipe.scheme.name,
            "format": self.format,
            "format_reason": self.format_reason,
            "loads_in": self.loads_in,
            "residual": self.residual,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "peak_bytes": self.peak_bytes,
            "calibration": None if self.calibration is None else self.calibration.model_dump(mode="json"),
            "kv_cache": None if self.kv is None else self.kv.model_dump(mode="json"),
            "notes": list(self.notes),
            "layers": [
                {
                    "name": layer.name,
                    "shape": [layer.out_features, layer.in_features],
                    "format": None if layer.format is None else layer.format.model_dump(mode="json"),
                    "reason": layer.reason,
                    "bytes": layer.stored_bytes,
                }
                for layer in self.layers
            ],
        }


def make_plan(recipe: Recipe, source: Path, skeleton: Skeleton, checkpoint: Checkpoint) -> Plan:
    """Decide everything that can be decided from the recipe and the shapes.

    Raises:
        RecipeError: the recipe cannot be carried out on this model (every problem of a kind in one line).
    """
    steps = bind_steps(recipe).settled(fused=bool(checkpoint.basis))
    scheme = recipe.scheme
    if scheme.weights is None:
        raise RecipeError(
            f"scheme {scheme.name} leaves the weights as they are; give their bits, for example W4A16G64."
        )
    kv = _plan_kv(recipe, skeleton, steps.transforms)
    scale_dtype = model_dtype(recipe, skeleton, checkpoint)
    layers = _plan_layers(recipe, skeleton, steps.transforms, scale_dtype)
    kept = [layer for layer in layers if layer.format is None]
    if len(kept) == len(layers):
        raise RecipeError(f"nothing is left to quantise: all {len(layers)} linears match ignore {list(recipe.ignore)}.")
    notes = [skeleton.limits] if skeleton.limits else []
    notes += [f"the residual stream is {checkpoint.basis}"] if checkpoint.basis else []
    calibration = None
    static = scheme.activations is not None and not scheme.activations.dynamic
    if steps.need_data or static:
        calibration, changed = recipe.calibration.fitted(skeleton.config)
        notes += [changed] if changed else []
    obstacle = portable_reason({layer.name: layer.format for layer in layers if layer.format}, _shapes(layers))
    if kv is not None:
        notes.append(f"keys and values are kept as {kv.describe()}")
        how = f"of {kv.bits} bits" if isinstance(kv, KVFormat) else f"by {kv.method}"
        obstacle = f"it has no field for keys and values {how} in the cache."
    if recipe.format == "compressed-tensors" and obstacle:
        raise RecipeError(f"--format compressed-tensors cannot hold this result: {obstacle} Use --format auto.")
    native = recipe.format == "quantkit" or obstacle is not None
    reason = (obstacle or "asked for") if native else "every tensor of the result has a compressed-tensors form"
    if not native:
        notes += _marlin_notes(layers)
    quantised = sum(layer.stored_bytes for layer in layers if layer.format)
    rest = checkpoint.nbytes - sum(
        skeleton.tensor_info(f"{layer.name}.weight", checkpoint).nbytes for layer in layers if layer.format
    )
    return Plan(
        recipe=recipe,
        source=source,
        layers=layers,
        steps=steps,
        format="quantkit" if native else "compressed-tensors",
        format_reason=reason,
        scale_dtype=scale_dtype,
        source_bytes=checkpoint.source_bytes,
        output_bytes=quantised + rest + _kv_bytes(kv, skeleton, scale_dtype),
        peak_bytes=_peak_bytes(layers, skeleton, checkpoint) + _calibration_bytes(layers, steps, calibration, skeleton),
        notes=tuple(notes),
        calibration=calibration,
        kv=kv,
        residual=checkpoint.basis,
    )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Is the module ``name`` named by one of ``patterns`` (exact, glob, ``re:`` full match), or inside one that is?"""
    parts = name.split(".")
    ends = {".".join(parts[start:]) for start in range(len(parts))}
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.fullmatch(pattern[3:], name):
                return True
        elif any(fnmatchcase(end, pattern) for end in ends) or name.startswith(pattern + "."):
            return True
    return False


def model_dtype(recipe: Recipe, skeleton: Skeleton, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of scales and unquantised weights: the recipe's, else the one most linears of the source have."""
    if recipe.dtype != "auto":
        chosen: torch.dtype = getattr(torch, recipe.dtype)
        return chosen
    first = skeleton.linears(0)[0].name
    return skeleton.tensor_info(f"{skeleton.block_prefix(0)}{first}.weight", checkpoint).dtype


def _wanted_kv(recipe: Recipe) -> AnyKV | None:
    if recipe.scheme.kv is not None:
        return KVFormat.of(recipe.scheme.kv, recipe.seed)
    settings = dict(recipe.kv or {})
    method = settings.pop("method", None)
    return None if method is None else kv_of(method, settings, recipe.seed)


def _plan_kv(recipe: Recipe, skeleton: Skeleton, transforms: tuple[BoundStep, ...]) -> AnyKV | None:
    scheme, kv = recipe.scheme, _wanted_kv(recipe)
    if kv is None:
        return None
    reason = why_not(skeleton.model, kv)
    if reason and scheme.kv is not None:
        raise RecipeError(f"scheme {scheme.name}: {reason}; leave KV{scheme.kv.bits} out.")
    if reason:
        raise RecipeError(f"kv: {reason}; leave it out, or choose another of `quantkit methods`.")
    if not isinstance(kv, KVFormat):
        return kv
    learning = next((step.method.name for step in transforms if getattr(step.config, "keys", False)), None)
    if learning is None:
        return kv
    odd = next((one.path for one in attentions(skeleton.model) if not key_dim(one.module)), None)
    if odd is not None:
        raise RecipeError(
            f"step '{learning}': '{odd}' does not say how wide its keys are, so no matrix can be learned for them; "
            "give the option keys: false."
        )
    return kv.to_be_learned()


def _kv_bytes(kv: AnyKV | None, skeleton: Skeleton, dtype: torch.dtype) -> int:
    """Of what is stored about keys and values."""
    if kv is None:
        return 0
    return sum(kv.stored_bytes(key_dim(one.module), dtype) for one in attentions(skeleton.model))


def _plan_layers(
    recipe: Recipe, skeleton: Skeleton, transforms: tuple[BoundStep, ...], scale_dtype: torch.dtype
) -> tuple[LayerPlan, ...]:
    weights = recipe.scheme.weights
    assert weights is not None
    activations = recipe.scheme.activations
    layers = []
    for index in range(skeleton.num_blocks):
        prefix = skeleton.block_prefix(index)
        wanted = [info for info in skeleton.linears(index) if not matches(prefix + info.name, recipe.ignore)]
        names = {info.name for info in wanted}
        online: dict[str, set[str]] = defaultdict(set)
        for step in transforms:
            for name, ops in step.module.online(skeleton.sites(index), names, step.config).items():
                online[name] |= ops
                _check_last(step, ops, transforms)
        for info in skeleton.linears(index):
            name = prefix + info.name
            if info.name not in names:
                size = info.out_features * info.in_features * scale_dtype.itemsize
                layers.append(LayerPlan(name, info.out_features, info.in_features, None, "ignored", size))
                continue
            op = next((op for op in _MATRICES if op in online[info.name]), "none")
            left = kronecker_left(skeleton.sites(index), info.name, info.in_features) if op == "kronecker" else None
            layer = LayerFormat(
                weights=resolve(weights, info.in_features),
                activations=activations,
                input_scale="scale" in online[info.name],
                input_shift="shift" in online[info.name],
                input_op="none" if left == 1 else op,
                input_left=None if left == 1 else left,
                input_clip="clip" in online[info.name] and activations is not None and activations.dynamic,
            )
            size = stored_bytes(layer, info.out_features, info.in_features, scale_dtype)
            layers.append(LayerPlan(name, info.out_features, info.in_features, layer, "", size))
    return tuple(layers)


def _check_last(step: BoundStep, ops: Collection[str], transforms: tuple[BoundStep, ...]) -> None:
    """No transform may come after one that multiplies inputs by matrices."""
    if step is not transforms[-1] and any(op in ops for op in _MATRICES):
        later = transforms[transforms.index(step) + 1].method.name
        raise RecipeError(
            f"step '{later}' comes after '{step.method.name}', which mixes the input channels of linears: behind it "
            f"there are none to be scaled or mixed again, so put '{step.method.name}' last of the transforms."
        )


def resolve(weights: WeightScheme, in_features: int) -> WeightScheme:
    """The scheme for one layer: symmetry decided, and a group as wide as the row is per channel."""
    group = PER_CHANNEL if weights.group_size >= in_features else weights.group_size
    return weights.model_copy(update={"symmetric": weights.is_symmetric, "group_size": group})


def _shapes(layers: Iterable[LayerPlan]) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.out_features, layer.in_features) for layer in layers}


def _marlin_notes(layers: Iterable[LayerPlan]) -> list[str]:
    """vLLM's fast kernels want out % 64 == 0 and in % 128 == 0; others run, more slowly."""
    odd = [layer.name for layer in layers if layer.format and (layer.out_features % 64 or layer.in_features % 128)]
    if not odd:
        return []
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return [f"vLLM's Marlin kernels need out_features % 64 == 0 and in_features % 128 == 0: not so for {odd[0]}{more}."]


def _peak_bytes(layers: tuple[LayerPlan, ...], skeleton: Skeleton, checkpoint: Checkpoint) -> int:
    """Upper estimate of what one block needs: float32 copies, packed result, the probe's dense block, and scratch.

    Tensors outside the blocks are read one file write at a time, so the larger of the two counts.
    """
    block = 0
    largest = 0
    for index in range(skeleton.num_blocks):
        prefix = skeleton.block_prefix(index)
        sizes = [layer.out_features * layer.in_features for layer in layers if layer.name.startswith(prefix)]
        block, largest = max(block, sum(sizes)), max(largest, *sizes)
    other = sum(skeleton.tensor_info(name, checkpoint).nbytes for name in skeleton.other_tensors())
    interpreter = 350 * 2**20
    return interpreter + max(block * (4 + 4 + 2) + largest * 12, 2 * other)


def _calibration_bytes(
    layers: tuple[LayerPlan, ...], steps: Steps, calibration: Calibration | None, skeleton: Skeleton
) -> int:
    """What samples add: hidden states before and behind a block, a batch on its way, a second block, a Hessian."""
    if calibration is None:
        return 0
    tokens = calibration.nsamples * calibration.seqlen
    streams = (2 if steps.wants_float_stream else 1) + 1
    states = streams * tokens * skeleton.config.hidden_size * 4
    if calibration.max_memory_bytes is not None:
        states = min(states, calibration.max_memory_bytes)
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    batch = 6 * min(calibration.batch_size * calibration.seqlen, tokens) * widest * 4
    hessian = 0
    if any("hessian" in step.statistics for step in steps):
        columns = max(layer.in_features for layer in layers)
        hessian = columns * columns * (4 + 4 + 8)  # accumulated, in processing order, factorised
    if steps.learn_steps:  # samples twice, and float64 matrices on the way to the next rotation
        hessian = max(hessian, 2**28 + 8 * 8 * skeleton.config.hidden_size**2)
    return states + batch + hessian
