"""A model without its weights: names, shapes, linears and sites of every block, and real blocks on demand."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, dot_natural_key
from transformers.quantizers.base import HfQuantizer

from quantkit.errors import QuantkitError
from quantkit.layers.quant_experts import ExpertNames
from quantkit.models.architectures import ARCHITECTURES
from quantkit.models.block import Block, LinearInfo, QueryKey, Site
from quantkit.models.checkpoint import Checkpoint, TensorInfo
from quantkit.models.names import NameMap
from quantkit.models.sites import expert_shapes, query_key, refusals, sites
from quantkit.models.source import auto_class


@dataclass(frozen=True)
class _Source:
    """Where a canonical tensor comes from: a whole checkpoint tensor, or one expert's rows of a fused one."""

    name: str
    expert: int | None = None
    rows: tuple[int | None, int | None] = (None, None)

    def cut(self, tensor: Tensor) -> Tensor:
        return tensor if self.expert is None else tensor[self.expert, slice(*self.rows)]


class Skeleton:
    """Built from a configuration on the meta device and the names in a checkpoint; no weight is read.

    Canonical names are explained in ``names.py``. Fused 3-D experts of a checkpoint have no names of their own: each
    expert's matrices appear as ``...experts.3.gate_proj.weight`` and are cut out when they are read.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        checkpoint: Checkpoint,
        *,
        trust_remote_code: bool = False,
        quantizer: HfQuantizer | None = None,
    ) -> None:
        """
        Args:
            config: the model's configuration as ``load_config`` gives it.
            checkpoint: only its names are used; tensors are read from the checkpoint given to each ``read_...``.
            trust_remote_code: allow the model's own code.
            quantizer: of a packed checkpoint: puts the layers that hold packed tensors into every model that is built,
                before anything is looked up in it, as ``from_pretrained`` has it do.

        Raises:
            QuantkitError: the configuration is of no language model, or has no repeated blocks.
        """
        self._full_config = config
        self._quantizer = quantizer
        self.trust_remote_code = trust_remote_code
        self._models: dict[torch.dtype, PreTrainedModel] = {}
        self.model = self.meta_model(torch.float32)
        """The whole model on the meta device, in eval mode."""
        self.config: Any = self.model.config.get_text_config()
        self.class_name = type(self.model).__name__
        self.architecture = ARCHITECTURES.get(self.class_name)
        self.blocks_path = blocks_path(self.model)
        self.num_blocks = len(self._block_list(self.model))
        self.names = NameMap(self.model, checkpoint.names, quantizer)
        self._sources = self._find_sources()
        self.tied: bool = bool(self.model.all_tied_weights_keys)
        """The head is the embedding: the checkpoint may lack one of the two."""
        self.limits = self._describe_limits()
        """What methods cannot have of this model, and why, in one line; empty when there is nothing to say."""

    # --- structure ---------------------------------------------------------------------------------------------------

    def meta_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the meta device as ``from_pretrained(dtype=dtype)`` would build it; one per dtype is kept."""
        if dtype not in self._models:
            self._models[dtype] = self.new_model(dtype)
        return self._models[dtype]

    def new_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model on the meta device that is the caller's to change."""
        loader = auto_class(self._full_config)
        try:
            with torch.device("meta"):
                model: PreTrainedModel = loader.from_config(
                    copy.deepcopy(self._full_config), dtype=dtype, trust_remote_code=self.trust_remote_code
                )
        except ValueError as error:
            raise QuantkitError(
                f"a model of type '{self._full_config.model_type}' cannot be built as a language model "
                f"({loader.__name__}): {' '.join(str(error).split())[:200]}"
            ) from None
        if self._quantizer is not None:
            self._quantizer.preprocess_model(model)
        return model.eval()

    def block_prefix(self, index: int) -> str:
        """``model.layers.3.``"""
        return f"{self.blocks_path}.{index}."

    def block_module(self, index: int) -> nn.Module:
        """Block ``index`` on the meta device."""
        return self._block_list(self.model)[index]

    def linears(self, index: int) -> tuple[LinearInfo, ...]:
        """The matrices of block ``index`` that may be quantised, in the order of the modules; experts one by one."""
        block, prefix = self.block_module(index), self.block_prefix(index)
        keep = self.architecture.never_quantised if self.architecture else ()
        experts = expert_shapes(self.architecture, block) if self.architecture else {}
        found = []
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and path not in keep and f"{prefix}{path}.weight" in self._sources:
                found.append(LinearInfo(path, module.out_features, module.in_features, module.bias is not None))
            elif self.architecture and self.architecture.experts and path == self.architecture.experts.path:
                found.extend(LinearInfo(name, rows, columns, False) for name, (rows, columns) in experts.items())
        return tuple(found)

    @property
    def expert_names(self) -> ExpertNames:
        """What the projections of an expert are called in linears' names."""
        experts = self.architecture.experts if self.architecture else None
        return ExpertNames(experts.gate, experts.up, experts.down) if experts else ExpertNames()

    def sites(self, index: int) -> tuple[Site, ...]:
        """Where activations of block ``index`` can be transformed; none for an unknown architecture."""
        if self.architecture is None:
            return ()
        return sites(self.architecture, self.config, self.block_module(index))

    def query_key(self, index: int) -> QueryKey | None:
        """Where queries and keys of block ``index`` can be scaled; None for an unknown architecture."""
        if self.architecture is None:
            return None
        return query_key(self.architecture, self.config, self.block_module(index))

    # --- tensors -----------------------------------------------------------------------------------------------------

    def checkpoint_name(self, name: str) -> str:
        """Canonical tensor name -> its name in a checkpoint that is named as the source is; see ``NameMap``."""
        return self.names.checkpoint_name(name)

    def stored_in(self, name: str) -> str | None:
        """Checkpoint name of the tensor that the canonical tensor ``name`` is, or is a part of; None: there is none."""
        source = self._sources.get(name)
        return source.name if source else None

    def block_tensors(self, index: int) -> tuple[str, ...]:
        """Local names of the tensors of block ``index``: canonical names without the block's prefix."""
        prefix = self.block_prefix(index)
        return tuple(name.removeprefix(prefix) for name in self._sources if name.startswith(prefix))

    def other_tensors(self) -> tuple[str, ...]:
        """Canonical names of the tensors outside the blocks (embeddings, final norm, head)."""
        return tuple(name for name in self._sources if not name.startswith(f"{self.blocks_path}."))

    def extra_tensors(self) -> tuple[str, ...]:
        """Checkpoint names of the tensors that transformers does not load (MTP heads, old buffers)."""
        return self.names.extra

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare every tensor of ``checkpoint`` with the model, from the headers alone.

        Raises:
            QuantkitError: a tensor is missing or has another shape than the configuration asks for, or no block has a
                linear that could be quantised.
        """
        if self._quantizer is None and not any(self.linears(index) for index in range(self.num_blocks)):
            raise QuantkitError(
                f"{self.class_name} has no nn.Linear in '{self.blocks_path}', so there is nothing that quantkit can "
                "quantise; its matrices are of a kind of their own (see CONTRIBUTING on adding an architecture)."
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        tied = self.model.all_tied_weights_keys
        partner = tied | {source: target for target, source in tied.items()}
        loaded = set(self.names.target.values())
        missing = [name for name in shapes if name not in loaded and partner.get(name) not in loaded]
        for index in range(self.num_blocks):
            for linear in self.linears(index):
                name = f"{self.block_prefix(index)}{linear.name}.weight"
                shapes[name] = (linear.out_features, linear.in_features)
                if name not in self._sources:  # an expert; its siblings are there
                    missing.append(name)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise QuantkitError(
                f"{checkpoint.folder}: tensor {missing[0]}{more} that {self.class_name} needs is in no file; "
                "the checkpoint is incomplete or config.json belongs to another model."
            )
        for stored, canonical in self.names.canonical.items():
            info = checkpoint.names[stored]
            if canonical in shapes and info.shape != shapes[canonical]:
                raise QuantkitError(
                    f"{info.file}: tensor {stored} has shape {list(info.shape)}, but config.json makes it "
                    f"{list(shapes[canonical])}; the file or the configuration belongs to another model."
                )

    def tensor_info(self, name: str, checkpoint: Checkpoint) -> TensorInfo:
        """File, dtype and shape of the canonical tensor ``name``, also of one expert's part of a fused tensor."""
        source = self._sources[name]
        info = checkpoint.names[source.name]
        return replace(info, shape=tuple(source.cut(torch.empty(info.shape, device="meta")).shape))

    def read_tensors(self, names: Iterable[str], checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Canonical name -> tensor in its stored dtype; experts cut out of fused tensors."""
        sources = {name: self._sources[name] for name in names}
        stored = checkpoint.read_many({source.name: None for source in sources.values()})
        return {name: source.cut(stored[source.name]) for name, source in sources.items()}

    def read_block(self, index: int, checkpoint: Checkpoint) -> Block:
        """Block ``index`` with float32 working copies of its tensors (integer tensors stay as they are)."""
        prefix = self.block_prefix(index)
        stored = self.read_tensors([prefix + name for name in self.block_tensors(index)], checkpoint)
        tensors, dtypes = {}, {}
        while stored:  # one by one, so that the stored and the working copy of a block never exist side by side
            name, tensor = stored.popitem()
            dtypes[name.removeprefix(prefix)] = tensor.dtype
            tensors[name.removeprefix(prefix)] = tensor.float() if tensor.is_floating_point() else tensor
        linears, sites = self.linears(index), self.sites(index)
        return Block(index, prefix, tensors, dtypes, linears, sites, self.query_key(index))

    def build_block(self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """A real block on the CPU in eval mode.

        Args:
            index: which block.
            tensors: local name -> dense tensor, as ``read_block`` names them; floating ones are cast to ``dtype``.
                A tensor that is of ``dtype`` already is used as it is, without a copy.
            dtype: of the block's weights.

        Raises:
            RuntimeError: a tensor is missing, unknown or has the wrong shape.
        """
        model = self.meta_model(dtype)
        source = self._block_list(model)[index]
        block = copy.deepcopy(source, {id(config): config for config in _configs(source)})
        restore_buffers(model, self.block_prefix(index).rstrip("."), block)
        filled = self._merge(index, tensors)
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in filled.items()}
        block.load_state_dict(cast, strict=True, assign=True)
        return block.requires_grad_(False)

    def _merge(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local names as in a checkpoint -> local names of the module, by transformers' own converters."""
        prefix = self.block_prefix(index)
        merged: dict[str, Tensor] = {}
        converters: dict[str, WeightConverter] = {}
        by_pattern = {pattern: entry for entry in self.names.converters for pattern in entry.source_patterns}
        for local in sorted(tensors, key=dot_natural_key):  # experts in order: converters stack what comes
            found = self.names.merged_into(prefix + local)
            if found is None:
                merged[local] = tensors[local]
                continue
            target, pattern = found
            if target not in converters:  # every merged tensor needs a converter of its own
                converters[target] = copy.deepcopy(by_pattern[pattern])
            converters[target].collected_tensors[pattern].append(tensors[local])  # type: ignore[arg-type]  # as it does on saving
        for target, converter in converters.items():
            for name, value in converter.convert(target, model=self.model, config=self.model.config).items():
                merged[name.removeprefix(prefix)] = value[0] if isinstance(value, list) else value
        return merged

    # --- set-up ------------------------------------------------------------------------------------------------------

    def _block_list(self, model: PreTrainedModel) -> nn.ModuleList:
        blocks = model.get_submodule(self.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _find_sources(self) -> dict[str, _Source]:
        """Canonical name -> source, with fused experts of known architectures taken apart."""
        fused: dict[str, list[tuple[str, tuple[int | None, int | None]]]] = {}
        experts = self.architecture.experts if self.architecture else None
        if experts:
            for index in range(self.num_blocks):
                shapes = expert_shapes(self.architecture, self.block_module(index))  # type: ignore[arg-type]
                if shapes:
                    width = shapes[f"{experts.path}.0.{experts.up}"][0]
                    path = self.block_prefix(index) + experts.path
                    fused[f"{path}.gate_up_proj"] = [
                        (experts.gate, (0, width)),
                        (experts.up, (width, 2 * width)),
                    ]
                    fused[f"{path}.down_proj"] = [(experts.down, (None, None))]
        sources = {}
        for stored, canonical in self.names.canonical.items():
            if canonical not in fused:
                sources[canonical] = _Source(stored)
                continue
            path = canonical.rpartition(".")[0]
            for expert in range(self.model.get_parameter(canonical).shape[0]):
                for leaf, rows in fused[canonical]:
                    sources[f"{path}.{expert}.{leaf}.weight"] = _Source(stored, expert, rows)
        return sources

    def _describe_limits(self) -> str:
        if self.architecture:
            reasons = {f"{site} cannot be folded: {why}" for site, why in refusals(self.architecture, self.config)}
            return "; ".join(sorted(reasons))
        text = (
            f"{self.class_name} is not in quantkit's architecture tables: every nn.Linear in '{self.blocks_path}' can "
            "be quantised weight-only; transforms that fold into norms and projections (awq, smoothquant, absorbed "
            "sinq, rotations) cannot be used, because which modules feed which is not known"
        )
        blocks = self._block_list(self.model)
        left = sorted({name for block in blocks for name, p in block.named_parameters() if p.dim() == 3})
        return text + (f"; these stay in full precision: {', '.join(left)}" if left else "")


def restore_buffers(model: PreTrainedModel, path: str, module: nn.Module, recurse: bool = True) -> None:
    """Give ``module`` real non-persistent buffers (rotary frequencies, embedding scales), which no checkpoint holds.

    They are computed by the model's own initialisation, as ``from_pretrained`` does it. Parameters must still be on the
    meta device, where initialising them changes nothing.

    Args:
        model: the meta model that ``module`` is from, or is a copy of a part of.
        path: where in ``model`` that is.
        module: what gets the buffers.
        recurse: also its submodules.

    Raises:
        QuantkitError: the model's code does not say how a buffer is computed.
    """
    owner = _owner(model, path)
    for name, part in module.named_modules() if recurse else [("", module)]:
        lost = {key: b for key, b in part.named_buffers(recurse=False) if key in part._non_persistent_buffers_set}
        if not lost:
            continue
        tries = []
        for filler in (1, 0):  # a buffer that shows what it was filled with was not computed
            part._buffers.update({key: torch.full_like(b, filler, device="cpu") for key, b in lost.items()})
            with torch.no_grad():
                owner._init_weights(part)
            tries.append(dict(part.named_buffers(recurse=False)))
        for key in lost:
            if not torch.equal(tries[0][key], tries[1][key]):
                where = ".".join(filter(None, (path, name, key)))
                raise QuantkitError(
                    f"{type(model).__name__}: the buffer {where} is in no checkpoint and the model's code does not "
                    "initialise it; this model cannot be run block by block."
                )


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost transformers model around ``path``: it is the one that initialises what is there."""
    owner, module = model, model
    for part in path.split(".") if path else ():
        module = getattr(module, part)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner


def _configs(module: nn.Module) -> list[PreTrainedConfig]:
    """The configurations that modules refer to: shared with a copy of the module, not copied."""
    return [value for part in module.modules() for value in vars(part).values() if isinstance(value, PreTrainedConfig)]


def blocks_path(model: PreTrainedModel) -> str:
    """Path of the list of blocks of ``model``.

    Raises:
        QuantkitError: it has none.
    """
    known = ARCHITECTURES.get(type(model).__name__)
    return known.blocks if known else _find_blocks(model, model.config.get_text_config())


def _find_blocks(model: PreTrainedModel, config: Any) -> str:
    """Path of the list of decoder blocks of an unknown architecture: as long as the configuration says, and largest."""
    lists = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    }
    if not lists:
        raise QuantkitError(
            f"{type(model).__name__} has no list of {getattr(config, 'num_hidden_layers', 'repeated')} blocks that "
            "quantkit could stream; add its architecture (see CONTRIBUTING)."
        )
    return max(lists, key=lambda path: lists[path])
