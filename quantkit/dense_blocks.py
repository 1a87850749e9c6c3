"""Dense float32 modules of blocks: as they came, as they stand between two steps, as an earlier run left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.kv import KVFormat, LearnedKV
from quantkit.formats.layer import LayerFormat, LayerInputs, from_tensors
from quantkit.kv.attach import attentions, quantise_kv, unlearned
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.block import Block
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.plan import Plan
from quantkit.transforms.apply import Transformed


class DenseBlocks:
    """Builds them as a plan says."""

    def __init__(self, plan: Plan, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self._plan = plan
        self._skeleton = skeleton
        self._checkpoint = checkpoint

    def float_module(self, index: int) -> nn.Module:
        """Block ``index`` as it came, float32."""
        block = self._skeleton.read_block(index, self._checkpoint)
        return self._skeleton.build_block(index, block.tensors, torch.float32)

    def restore(self, index: int, event: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        """The dense module of a block that an earlier run finished, as ``QuantisedBlock.module``.

        Args:
            event: the block's line in the run record.
            tensors: checkpoint name -> tensor of its shard.
        """
        prefix = self._skeleton.block_prefix(index)
        dense: dict[str, Tensor] = {}
        formats: dict[str, LayerFormat] = {}
        inputs: dict[str, LayerInputs] = {}
        for row in event["layers"]:
            layer = LayerFormat.model_validate(row["format"])
            local, stored = row["layer"].removeprefix(prefix), row["stored"]
            own = {name.removeprefix(f"{stored}."): t for name, t in tensors.items() if name.startswith(f"{stored}.")}
            weight, inputs[local] = from_tensors(own, layer)
            formats[local] = layer
            dense[f"{local}.weight"] = weight.dequantize()
        for local in self._skeleton.block_tensors(index):
            if local not in dense:
                dense[local] = tensors[self._skeleton.checkpoint_name(prefix + local)]
        module = self._skeleton.build_block(index, dense, torch.float32)
        simulate_inputs(module, formats, inputs, self._skeleton.expert_names)
        learned = {}
        for path, held in self.held_kv(index, {}).items():
            names = {suffix: self._skeleton.checkpoint_name(f"{prefix}{path}.{suffix}") for suffix in held.tensors()}
            learned[path] = LearnedKV(**{suffix: tensors[name] for suffix, name in names.items()})
        self.round_kv(module, index, learned)
        return module

    def module_of(self, state: Transformed, formats: Mapping[str, LayerFormat] | None) -> nn.Module:
        """A float32 block of the tensors as they are, which shares their memory.

        Args:
            formats: linears whose input is rounded as well, if their format says so; keys and values are, too, if the
                plan says so. None: nothing is rounded on its way.
        """
        module = self._skeleton.build_block(state.block.index, state.block.tensors, torch.float32)
        changed = dict(formats or {})
        for name in state.inputs:
            changed.setdefault(name, LayerFormat(weights=self.format_of(state.block, name).weights))
        simulate_inputs(module, changed, state.inputs, self._skeleton.expert_names)
        if formats is not None:
            self.round_kv(module, state.block.index, state.kv)
        return module

    def round_kv(self, module: nn.Module, index: int, learned: Mapping[str, LearnedKV]) -> None:
        """Make a block round its keys and values, if the plan says so, by what was learned about them."""
        if self._plan.kv is not None:
            quantise_kv(module, self._plan.kv, self.held_kv(index, learned))

    def held_kv(self, index: int, learned: Mapping[str, LearnedKV]) -> dict[str, LearnedKV]:
        """What the attentions of block ``index`` hold, as it is stored: what was learned, if the plan lets it be."""
        kv = self._plan.kv
        if not isinstance(kv, KVFormat) or not kv.learned_clips:
            return {}
        found = attentions(self._skeleton.block_module(index))
        return {one.path: learned.get(one.path) or unlearned(kv, one, self._plan.scale_dtype) for one in found}

    def format_of(self, block: Block, name: str) -> LayerFormat:
        """How linear ``name`` of ``block``, one that the plan quantises, is stored."""
        planned = self._plan.layer(block.prefix + name).format
        assert planned is not None
        return planned
