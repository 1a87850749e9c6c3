"""Names of tensors: as a checkpoint has them, and as the modules of transformers have them.

The canonical name of a tensor is the checkpoint's after transformers' renamings (``block_sparse_moe`` -> ``mlp``) and
with the base model's prefix as the model has it (``layers.0...`` -> ``model.layers.0...``). transformers' converters,
which merge or split tensors, are not applied: experts keep their own names.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.base import HfQuantizer


class NameMap:
    """The checkpoint's tensor names next to the model's."""

    def __init__(
        self, model: PreTrainedModel, checkpoint_names: Iterable[str], quantizer: HfQuantizer | None = None
    ) -> None:
        """Match ``checkpoint_names`` with ``model`` (meta device will do), which ``quantizer`` may have prepared."""
        transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        """transformers' merges and splits, in the order in which it tries them."""
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()

        self.canonical: dict[str, str] = {}
        """Checkpoint name -> canonical name, for every tensor that the model loads."""
        self.target: dict[str, str] = {}
        """Canonical name -> name of the model's tensor that it becomes, or becomes a part of."""
        self.extra: tuple[str, ...] = ()
        """Checkpoint names of the tensors that the model does not load, in order."""
        extra = []
        for name in sorted(checkpoint_names, key=dot_natural_key):
            found = self._match(name)
            if found is None:
                extra.append(name)
            else:
                self.canonical[name], self.target[found[0]] = found
        self.extra = tuple(extra)
        self._modules = self._pair_modules()
        self._tensors = {canonical: name for name, canonical in self.canonical.items()}

    def checkpoint_name(self, name: str) -> str:
        """The name under which the canonical tensor ``name`` belongs into a checkpoint that is named as the source is.

        The tensor need not be in the source: ``weight_packed`` of a module goes where its ``weight`` was.
        """
        if name in self._tensors:
            return self._tensors[name]
        module = name
        while module and module not in self._modules:
            module = module.rpartition(".")[0]
        rest = name[len(module) :].lstrip(".")
        return ".".join(part for part in (self._modules.get(module, ""), rest) if part)

    def merged_into(self, name: str) -> tuple[str, str] | None:
        """(the model's tensor that the canonical tensor becomes a part of, the converter's pattern that says so).

        None: no converter touches it, or the model has no such merged tensor (its experts were replaced).
        """
        target, pattern = apply_converters(name, self.converters)
        return None if pattern is None or target not in self._parameters else (target, pattern)

    def _match(self, name: str) -> tuple[str, str] | None:
        """(canonical name, model's tensor) or None: the steps by which transformers names a tensor it loads."""
        renamed = apply_renamings(name, self._renamings)
        for converters in (self.converters, []):
            converted, _ = apply_converters(renamed, converters)
            target, _ = rename_source_key(renamed, [], converters, self._prefix, self._parameters)
            if target in self._parameters:
                if target == f"{self._prefix}.{converted}":
                    return f"{self._prefix}.{renamed}", target
                if converted == f"{self._prefix}.{target}":
                    return renamed.removeprefix(f"{self._prefix}."), target
                return renamed, target
        return (name, name) if name in self._parameters else None  # a renaming hit a name that was right

    def _pair_modules(self) -> dict[str, str]:
        """Canonical module path -> path in the checkpoint, for the modules of all tensors and what holds them."""
        modules: dict[str, str] = {}
        for theirs, ours in self.canonical.items():
            while theirs and ours and theirs.rpartition(".")[2] == ours.rpartition(".")[2]:
                theirs, ours = theirs.rpartition(".")[0], ours.rpartition(".")[0]
                if ours in modules:
                    break
                modules[ours] = theirs
        return modules
