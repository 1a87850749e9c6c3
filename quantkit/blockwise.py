"""One block from float tensors to stored ones: check, observe, transform, round each linear, tune, pack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.dense_blocks import DenseBlocks
from quantkit.errors import QuantkitError
from quantkit.formats.layer import LayerFormat, LayerInputs, input_tensors, stored_bytes, weight_tensors
from quantkit.formats.quantized import QuantizedWeight
from quantkit.kernels.online import restore
from quantkit.models.block import Block
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.plan import Plan
from quantkit.recipe import PER_CHANNEL
from quantkit.steps import BoundStep
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Observed, Situation, Solution
from quantkit.tuning import interface as tuning

if TYPE_CHECKING:
    from quantkit.calibrate.hidden import HiddenStates
    from quantkit.calibrate.observe import BlockStatistics
    from quantkit.calibrate.session import Session


@dataclass
class QuantisedBlock:
    """What is left of a block once it is quantised."""

    module: nn.Module
    """Dense, float32, computes what the stored tensors will."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Checkpoint name -> tensor to store."""
    formats: dict[str, LayerFormat] = field(default_factory=dict)
    """Module name -> format, of the quantised linears."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row per quantised linear, for the run record."""
    kept: list[str] = field(default_factory=list)
    """Linears that stay in full precision because they are not finite."""
    transforms: list[dict[str, Any]] = field(default_factory=list)
    """What the transforms did, for the run record."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """What the tuning did."""


class BlockQuantizer:
    """Quantises blocks as a plan says."""

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        warn: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._recipe = plan.recipe
        self._skeleton = skeleton
        self._checkpoint = checkpoint
        self.dense = DenseBlocks(plan, skeleton, checkpoint)
        self._warn = warn
        self._note = note

    def quantise(
        self, block: Block, session: Session | None, solutions: Sequence[Solution] | None = None
    ) -> QuantisedBlock:
        """Quantise ``block``, whose tensors are used up.

        Args:
            session: the calibration samples before this block; needed if a step of the plan looks at data.
            solutions: what ``solve`` found for this block; None: solve here.

        Raises:
            QuantkitError: a tensor holds NaN or Inf and the recipe does not allow it.
        """
        state, broken = self._begin(block)
        names = state.quantised
        result = QuantisedBlock(nn.Identity(), kept=sorted(block.prefix + name for name in broken if name))
        tuned = self._plan.steps.tuning if session and names and not broken else None
        targets = self._targets(block, session, tuned) if session and tuned else None
        if not broken:
            self._transform(state, session, solutions)
        result.transforms = state.facts
        statistics = self._observe_for_rounding(state, session) if session and names else None
        reference = None
        if tuned and tuned.module.needs_reference(tuned.config):
            reference = self.dense.module_of(state, None)
        self._round_all(state, result, statistics)
        del statistics
        formats = {name.removeprefix(block.prefix): layer for name, layer in result.formats.items()}
        if session and targets and tuned:
            self._tune(state, formats, result, session, targets, reference, tuned)
        del reference
        self._keep_the_rest(block, names, result.tensors)
        if session:
            self._fix_ranges(state, formats, session)
        for name, layer in formats.items():
            columns = block.weight(name).shape[1]
            stored = input_tensors(state.input_of(name), layer, columns, self._plan.scale_dtype)
            for suffix, tensor in stored.items():
                result.tensors[self._skeleton.checkpoint_name(f"{block.prefix}{name}.{suffix}")] = tensor
        for path, held in self.dense.held_kv(block.index, state.kv).items():
            for suffix, tensor in held.tensors().items():
                result.tensors[self._skeleton.checkpoint_name(f"{block.prefix}{path}.{suffix}")] = tensor
        result.module = self.dense.module_of(state, formats)
        return result

    def solve(self, block: Block, session: Session) -> list[Solution]:
        """What the transforms of the plan find for ``block``, whose tensors are used up; none if it is damaged.

        Args:
            session: the calibration samples before this block.
        """
        state, broken = self._begin(block)
        return [] if broken else self._transform(state, session, None)

    def _begin(self, block: Block) -> tuple[Transformed, set[str]]:
        """The block before its transforms, and the owners of tensors of it that are not finite."""
        # Folds round norms to the dtype they are stored in, and let their consumers make up for it.
        block.stored_dtypes = {name: self.kept_dtype(dtype) for name, dtype in block.stored_dtypes.items()}
        broken = self._nonfinite(block)
        names = [
            info.name
            for info in block.linears
            if self._plan.layer(block.prefix + info.name).format is not None and info.name not in broken
        ]
        return Transformed(block, names, self._plan.scale_dtype, self._warn), broken

    def kept_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of a tensor that is not quantised: the one it had, or the one the recipe asks for."""
        if self._recipe.dtype == "auto" or not stored.is_floating_point:
            return stored
        return self._plan.scale_dtype

    # --- looking -----------------------------------------------------------------------------------------------------

    def _targets(self, block: Block, session: Session, tuned: BoundStep) -> HiddenStates:
        """What the block makes of the samples before anything is done to it."""
        module = self._skeleton.build_block(block.index, block.tensors, torch.float32)
        return session.outputs(module, "float" if getattr(tuned.config, "target", "") == "float" else "quantised")

    def _observe(
        self,
        state: Transformed,
        session: Session,
        step: BoundStep,
        names: Collection[str],
        formats: Mapping[str, LayerFormat] | None,
    ) -> tuple[nn.Module, BlockStatistics]:
        """The block as it is, and what enters its modules ``names``."""
        module = self.dense.module_of(state, formats)
        want: Any = step.statistics
        rounds = formats is not None and (self._recipe.scheme.activations or self._plan.kv)
        reference = self.dense.module_of(state, None) if "cross" in want and rounds else None
        statistics = session.observe(module, names, want, reference=reference, stream=step.stream)
        for path, samples in sorted(statistics.nonfinite.items()):
            self._warn(
                f"{state.block.prefix}{path}: the input holds NaN or Inf for calibration samples "
                f"{', '.join(map(str, sorted(samples)[:8]))}; {step.method.name} does without them."
            )
        return module, statistics

    def _observe_for_rounding(self, state: Transformed, session: Session) -> BlockStatistics | None:
        step = self._plan.steps.rounding
        if not step.statistics:
            return None
        # Where inputs are rounded at run time, they are here.
        formats = {name: self.dense.format_of(state.block, name) for name in state.quantised}
        _, statistics = self._observe(state, session, step, state.quantised, formats)
        return statistics

    # --- changing ----------------------------------------------------------------------------------------------------

    def _transform(
        self, state: Transformed, session: Session | None, solutions: Sequence[Solution] | None
    ) -> list[Solution]:
        """Carry out the transforms, by what was found for them (None: find it here); returns what was carried out."""
        block = state.block
        if solutions is not None:
            for step, solution in zip(self._plan.steps.transforms, solutions, strict=True):
                state.apply(step.method.name, solution)
            return list(solutions)
        found: list[Solution] = []
        readers = {name: None for site in block.sites for name in site.consumers} | dict.fromkeys(state.quantised)
        for step in self._plan.steps.transforms:
            observed = None
            if session and state.quantised and step.needs_data:
                module, statistics = self._observe(state, session, step, readers, None)
                lessons = session.lessons(
                    module, readers, lambda module: self.dense.round_kv(module, block.index, state.kv)
                )
                observed = Observed(statistics, session.replays(module, state.quantised), lessons)
            situation = Situation(
                block=block,
                linears=state.quantised,
                scheme=self._recipe.scheme,
                weights_of=lambda name: self.dense.format_of(block, name).weights,
                scale_dtype=self._plan.scale_dtype,
                rounding=self._plan.steps.rounding.method.name,
                seed=self._recipe.seed,
                observed=observed,
                kv=self._plan.kv,
                note=self._note,
            )
            found.append(step.module.solve(situation, step.config) if state.quantised else Solution())
            state.apply(step.method.name, found[-1])
        return found

    def _round_all(self, state: Transformed, result: QuantisedBlock, statistics: BlockStatistics | None) -> None:
        """Replace the weight of every quantised linear of the block by what its codes say."""
        block = state.block
        prepared = _Prepared()
        for info in block.linears:
            if info.name not in state.quantised:
                continue
            name, weight, inputs = block.prefix + info.name, block.weight(info.name), state.input_of(info.name)
            layer = self.dense.format_of(block, info.name).with_inputs(inputs)
            rounded = _limited(weight, state, info.name, layer)
            quantised, facts = self._round(name, info.name, rounded, layer, statistics, prepared)
            stored = weight_tensors(quantised, layer)
            for suffix, tensor in stored.items():
                result.tensors[self._skeleton.checkpoint_name(f"{name}.{suffix}")] = tensor
            dense = quantised.dequantize()
            result.formats[name] = layer
            result.rows.append(
                {
                    "layer": name,
                    "stored": self._skeleton.checkpoint_name(f"{name}.weight").removesuffix(".weight"),
                    "shape": [info.out_features, info.in_features],
                    "format": layer.model_dump(mode="json"),
                    "bytes": stored_bytes(layer, info.out_features, info.in_features, self._plan.scale_dtype),
                    "error": _relative_error(weight, dense, state.columns.get(info.name), inputs),
                    **facts,
                }
            )
            block.tensors[f"{info.name}.weight"] = dense

    def _round(
        self,
        name: str,
        local: str,
        weight: Tensor,
        layer: LayerFormat,
        statistics: BlockStatistics | None,
        prepared: _Prepared,
    ) -> tuple[QuantizedWeight, dict[str, Any]]:
        """Codes of ``weight``, and what the record says of them."""
        step, dtype = self._plan.steps.rounding, self._plan.scale_dtype
        if statistics is None:
            return step.module.quantize(weight, layer.weights, dtype, step.config), {}
        seen = statistics.inputs.pop(local)
        if seen is not prepared.seen:
            prepared.seen, prepared.value = seen, step.module.prepare(seen, layer.weights, step.config)
        rounded = step.module.quantize(weight, layer.weights, dtype, step.config, prepared.value)
        if rounded.fallback:
            self._warn(f"{name}: rounded to nearest instead of by {step.method.name}: {rounded.fallback}.")
        return rounded.weight, {"loss": rounded.loss, "damping": rounded.damping, "fallback": rounded.fallback}

    def _nonfinite(self, block: Block) -> set[str]:
        """Owners of tensors with NaN or Inf. Without ``allow_nonfinite`` the first broken tensor ends the run."""
        bad = [name for name, tensor in block.tensors.items() if not _finite(tensor)]
        if bad and not self._recipe.allow_nonfinite:
            name = self._skeleton.checkpoint_name(block.prefix + bad[0])
            file = self._skeleton.tensor_info(block.prefix + bad[0], self._checkpoint).file
            raise QuantkitError(
                f"tensor {name} in {file} holds NaN or Inf: the source is damaged, fetch it again; "
                "--allow-nonfinite keeps such layers in full precision and goes on."
            )
        owners = {name.rpartition(".")[0] for name in bad}
        for owner in sorted(owners):
            self._warn(f"{block.prefix}{owner} holds NaN or Inf: kept in full precision, block not transformed.")
        return owners

    def _tune(
        self,
        state: Transformed,
        formats: Mapping[str, LayerFormat],
        result: QuantisedBlock,
        session: Session,
        targets: HiddenStates,
        reference: nn.Module | None,
        step: BoundStep,
    ) -> None:
        """Change what is not quantised so that the block comes closer to ``targets``."""
        block, architecture = state.block, self._skeleton.architecture
        situation = tuning.Situation(
            index=block.index,
            blocks=self._skeleton.num_blocks,
            module=self.dense.module_of(state, formats),
            reference=reference,
            streams=session.streams,
            targets=targets,
            sites=block.sites,
            norm_offset=architecture.norm_offset if architecture else 0.0,
            stored_dtypes=block.stored_dtypes,
            seed=self._recipe.seed,
        )
        tuned = step.module.tune(situation, step.config)
        targets.close()
        if tuned.warning:
            self._warn(f"block {block.index}: {step.method.name}: {tuned.warning}")
        sound = {name: tensor for name, tensor in tuned.tensors.items() if _finite(tensor)}
        for name in tuned.tensors.keys() - sound.keys():
            self._warn(f"{block.prefix}{name}: {step.method.name} found no finite values; it stays as it was.")
        block.tensors |= sound
        result.tuning = {"method": step.method.name, **tuned.facts}

    def _fix_ranges(self, state: Transformed, formats: Mapping[str, LayerFormat], session: Session) -> None:
        """Static ranges of inputs, measured on the block as it will be stored before its own inputs are rounded."""
        static = {name: layer for name, layer in formats.items() if layer.activations and not layer.activations.dynamic}
        if not static:
            return
        from quantkit.calibrate.ranges import static_range

        module = self.dense.module_of(state, {})
        statistics = session.observe(module, list(static), ("range", "tokens"), skip_first=0)  # none may be clipped
        for name, layer in static.items():
            assert layer.activations is not None
            scale, zero_point = static_range(statistics.inputs[name], layer.activations, self._plan.scale_dtype)
            state.inputs[name] = replace(state.input_of(name), static_scale=scale, static_zero_point=zero_point)

    def _keep_the_rest(self, block: Block, quantised: Collection[str], tensors: dict[str, Tensor]) -> None:
        """Everything of the block that is not quantised, in the dtype it had (or the one asked for)."""
        for local, tensor in block.tensors.items():
            owner, _, leaf = local.rpartition(".")
            if owner in quantised and leaf == "weight":
                continue
            name = self._skeleton.checkpoint_name(block.prefix + local)
            tensors[name] = tensor.to(block.stored_dtypes[local])
            block.tensors[local] = tensors[name].float() if tensor.is_floating_point() else tensor


@dataclass
class _Prepared:
    """What a rounding made of the statistics of one input, for all linears that read it."""

    seen: Any = None
    value: Any = None


def _limited(weight: Tensor, state: Transformed, name: str, layer: LayerFormat) -> Tensor:
    """``weight`` clamped to the limits that a transform set for its groups."""
    if name not in state.limits:
        return weight
    columns, size = weight.shape[1], layer.weights.group_size
    width = columns if size == PER_CHANNEL else size
    low, high = (limit.repeat_interleave(width, dim=1)[:, :columns] for limit in state.limits[name])
    return weight.clamp(low, high)


def _finite(tensor: Tensor) -> bool:
    # The sum is NaN or Inf as soon as one element is; half the time of isfinite().all(), no mask in memory.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def _relative_error(weight: Tensor, dense: Tensor, column_scale: Tensor | None, inputs: LayerInputs) -> float:
    """Frobenius norm of the error over the weight's, measured on the source's columns (folded scales undone).

    Args:
        inputs: whose matrix, if any, the columns of both were multiplied by the inverse of, behind the scales.
    """
    if inputs.op != "none" and (inputs.op != "hadamard" or column_scale is not None):  # else no norm changes
        weight, dense = restore(weight, inputs), restore(dense, inputs)
    columns = torch.ones(weight.shape[1]) if column_scale is None else column_scale.float()
    error = torch.linalg.vector_norm(dense - weight, dim=0)  # per column: the scale then costs nothing
    norm = float((torch.linalg.vector_norm(weight, dim=0) * columns).norm())
    return float((error * columns).norm()) / norm if norm else 0.0
