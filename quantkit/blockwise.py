"""One block from float tensors to stored ones: check, transform, observe, round each linear, pack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.formats.layer import LayerFormat, from_tensors, to_tensors
from quantkit.formats.quantized import QuantizedWeight
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.block import Block
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.plan import Plan
from quantkit.transforms import fold

if TYPE_CHECKING:
    from quantkit.calibrate.observe import BlockStatistics

logger = logging.getLogger("quantkit")

Observe = Callable[[nn.Module, list[str]], "BlockStatistics"]
"""(float block, linears) -> statistics of what enters the linears."""


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


class BlockQuantizer:
    """Quantises blocks as a plan says."""

    def __init__(self, plan: Plan, skeleton: Skeleton, checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
        self._plan = plan
        self._recipe = plan.recipe
        self._skeleton = skeleton
        self._checkpoint = checkpoint
        self._warn = warn

    def quantise(self, block: Block, observe: Observe | None) -> QuantisedBlock:
        """Quantise ``block``, whose tensors are used up.

        Args:
            observe: needed if the rounding wants statistics; called once, on the block as it is after the transforms.

        Raises:
            QuantkitError: a tensor holds NaN or Inf and the recipe does not allow it.
        """
        # Folds round norms to the dtype they are stored in, and let their consumers make up for it.
        block.stored_dtypes = {name: self.kept_dtype(dtype) for name, dtype in block.stored_dtypes.items()}
        broken = self._nonfinite(block)
        wanted = [
            info
            for info in block.linears
            if self._plan.layer(block.prefix + info.name).format is not None and info.name not in broken
        ]
        names = {info.name for info in wanted}
        online, column_scale = self._transform(block, names) if not broken else ({}, {})
        dtype = self._plan.scale_dtype
        # Rounded to their stored dtype before anything is divided by them.
        input_scales = {name: online[name].to(dtype) if name in online else None for name in sorted(names)}
        statistics = self._observe(block, input_scales, observe) if observe and wanted else None
        activations = self._recipe.scheme.activations
        result = QuantisedBlock(nn.Identity(), kept=sorted(block.prefix + name for name in broken if name))
        for info in wanted:
            name, input_scale = block.prefix + info.name, input_scales[info.name]
            planned = self._plan.layer(name).format
            assert planned is not None
            layer = planned.model_copy(update={"input_scale": input_scale is not None})
            weight = block.weight(info.name)
            scaled = weight if input_scale is None else weight / input_scale.float()
            quantised, facts = self._round(name, scaled, layer, info.name, input_scale, statistics)
            stored = to_tensors(quantised, layer, input_scale)
            for suffix, tensor in stored.items():
                result.tensors[self._skeleton.checkpoint_name(f"{name}.{suffix}")] = tensor
            dense = quantised.dequantize()
            effective = dense if input_scale is None else dense * input_scale.float()
            result.formats[name] = layer
            result.rows.append(
                {
                    "layer": name,
                    "stored": self._skeleton.checkpoint_name(f"{name}.weight").removesuffix(".weight"),
                    "shape": [info.out_features, info.in_features],
                    "format": layer.model_dump(mode="json"),
                    "bytes": sum(tensor.nbytes for tensor in stored.values()),
                    "error": _relative_error(weight, effective, column_scale.get(info.name)),
                    **facts,
                }
            )
            block.tensors[f"{info.name}.weight"] = dense if activations else effective
        self._keep_the_rest(block, names, result.tensors)
        result.module = self._dense_module(block.index, block.tensors, input_scales)
        return result

    def restore(self, index: int, event: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        """The dense module of a block that an earlier run finished, as ``QuantisedBlock.module``.

        Args:
            event: the block's line in the run record.
            tensors: checkpoint name -> tensor of its shard.
        """
        prefix = self._skeleton.block_prefix(index)
        dense: dict[str, Tensor] = {}
        input_scales: dict[str, Tensor | None] = {}
        for row in event["layers"]:
            layer = LayerFormat.model_validate(row["format"])
            local, stored = row["layer"].removeprefix(prefix), row["stored"]
            own = {name.removeprefix(f"{stored}."): t for name, t in tensors.items() if name.startswith(f"{stored}.")}
            weight, input_scales[local] = from_tensors(own, layer)
            scale = input_scales[local]
            dense[f"{local}.weight"] = weight.dequantize()
            if scale is not None and not layer.activations:
                dense[f"{local}.weight"] *= scale.float()
        for local in self._skeleton.block_tensors(index):
            if local not in dense:
                dense[local] = tensors[self._skeleton.checkpoint_name(prefix + local)]
        return self._dense_module(index, dense, input_scales)

    def kept_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of a tensor that is not quantised: the one it had, or the one the recipe asks for."""
        if self._recipe.dtype == "auto" or not stored.is_floating_point:
            return stored
        return self._plan.scale_dtype

    def _dense_module(
        self, index: int, tensors: dict[str, Tensor], input_scales: dict[str, Tensor | None]
    ) -> nn.Module:
        """A float32 block; where activations are quantised its linears scale and round their input, else the scales
        are expected in the weights."""
        module = self._skeleton.build_block(index, tensors, torch.float32)
        if self._recipe.scheme.activations:
            simulate_inputs(module, self._recipe.scheme.activations, input_scales, self._skeleton.expert_names)
        return module

    def _observe(self, block: Block, input_scales: dict[str, Tensor | None], observe: Observe) -> BlockStatistics:
        """Statistics of the inputs as the rounding sees them where activations are quantised, else before scaling."""
        tensors = block.tensors
        if self._recipe.scheme.activations:
            scales = {f"{name}.weight": s.float() for name, s in input_scales.items() if s is not None}
            tensors = {name: t / scales[name] if name in scales else t for name, t in tensors.items()}
        return observe(self._dense_module(block.index, tensors, input_scales), list(input_scales))

    def _round(
        self,
        name: str,
        weight: Tensor,
        layer: LayerFormat,
        local: str,
        input_scale: Tensor | None,
        statistics: BlockStatistics | None,
    ) -> tuple[QuantizedWeight, dict[str, Any]]:
        """Codes of ``weight``, already divided by ``input_scale``, and what the record says of them."""
        step, dtype = self._plan.rounding, self._plan.scale_dtype
        if statistics is None:
            return step.module.quantize(weight, layer.weights, dtype, step.config), {}
        hessian = statistics.inputs[local].hessian
        if input_scale is not None and not layer.activations:
            t = input_scale.float()  # the input that meets the scaled weight is x * t
            hessian = hessian * t * t[:, None]
        rounded = step.module.quantize(weight, layer.weights, dtype, step.config, hessian)
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

    def _transform(self, block: Block, wanted: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Apply the transforms in order.

        Returns:
            Per linear the input-column scale [in_features] that stays online, and the column scale by which the
            stored weight differs from the source's (online or folded).
        """
        weights = self._recipe.scheme.weights
        assert weights is not None
        online: dict[str, Tensor] = {}
        total: dict[str, Tensor] = {}
        for step in self._plan.transforms:
            solution = step.module.solve(block, wanted, weights, step.config)
            for site in block.sites:
                if site.name not in solution.sites:
                    continue
                applied = fold.apply_scale(block, site, solution.sites[site.name], wanted)
                for consumer in site.consumers:
                    columns = fold.consumer_columns(site, applied)
                    total[consumer] = total[consumer] * columns if consumer in total else columns
            for name, scale in solution.linears.items():
                online[name] = online[name] * scale if name in online else scale
        for name, scale in online.items():
            total[name] = total[name] * scale if name in total else scale
        return online, total

    def _keep_the_rest(self, block: Block, quantised: set[str], tensors: dict[str, Tensor]) -> None:
        """Everything of the block that is not quantised, in the dtype it had (or the one asked for)."""
        for local, tensor in block.tensors.items():
            owner, _, leaf = local.rpartition(".")
            if owner in quantised and leaf == "weight":
                continue
            name = self._skeleton.checkpoint_name(block.prefix + local)
            tensors[name] = tensor.to(block.stored_dtypes[local])
            block.tensors[local] = tensors[name].float() if tensor.is_floating_point() else tensor


def _finite(tensor: Tensor) -> bool:
    # The sum is NaN or Inf as soon as one element is; half the time of isfinite().all(), no mask in memory.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def _relative_error(weight: Tensor, dense: Tensor, column_scale: Tensor | None) -> float:
    """Frobenius norm of the error over the weight's, measured on the source's columns (folded scales undone)."""
    columns = torch.ones(weight.shape[1]) if column_scale is None else column_scale.float()
    error = torch.linalg.vector_norm(dense - weight, dim=0)  # per column: the scale then costs nothing
    norm = float((torch.linalg.vector_norm(weight, dim=0) * columns).norm())
    return float((error * columns).norm()) / norm if norm else 0.0
