"""Packed checkpoints in transformers: ``AutoModelForCausalLM.from_pretrained`` of a native output, after
``import quantkit``.

``QuantkitConfig`` keeps the ``quantization_config`` block as it is in config.json and gives it back unchanged when the
model is saved. ``QuantkitHfQuantizer`` replaces the linears (and, where needed, the merged experts) of the empty model
by layers that hold packed tensors under their checkpoint names; transformers then fills them by name. Where the block
says so, attention keeps its keys and values quantised (``kv/attach.py``) and, on a CPU, reads them so while it
generates (``kv/attention_function.py``). Importing this module registers both;
``hook.py`` does so when it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.errors import QuantkitError
from quantkit.formats.config import NATIVE_METHOD, read_config, read_kv
from quantkit.formats.layer import LayerFormat
from quantkit.formats.matching import LayerFormats
from quantkit.kernels.dispatch import prepare_all
from quantkit.kv.attach import attentions, quantise_kv
from quantkit.kv.attention_function import choose_attention
from quantkit.layers.fusing import fuse_inputs
from quantkit.layers.quant_experts import ExpertNames, QuantExperts
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.sharing import share_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

_PORTABLE_KEY = "compressed_tensors"


def as_native(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block that loads ``block`` (of compressed-tensors) into quantkit's layers; it is saved as it was."""
    return {"quant_method": NATIVE_METHOD, _PORTABLE_KEY: dict(block)}


class QuantkitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model held by quantkit's layers.

    Raises:
        QuantkitError: the block says something quantkit cannot run.
    """

    def __init__(self, **block: Any) -> None:
        self.quant_method = NATIVE_METHOD  # type: ignore[assignment]  # the enum holds transformers' own methods only
        self.block: dict[str, Any] = block.get(_PORTABLE_KEY, block)
        self.formats = read_config(self.block)
        self.kv = read_kv(self.block)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.block)


class QuantkitHfQuantizer(HfQuantizer):
    """Prepares the empty model for packed tensors; quantising is ``quantkit.quantize``'s work, not done here."""

    requires_calibration = True
    quantization_config: QuantkitConfig

    def __init__(self, quantization_config: QuantkitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._experts_replaced = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        formats = self.quantization_config.formats
        linears = _replace_linears(model, formats)
        experts = _replace_experts(model, formats)
        self._experts_replaced = bool(experts)
        replaced = linears | experts
        missing = [name for name in formats.exact if name not in replaced and formats.of(name)]
        if missing or not replaced:
            what = f"'{missing[0]}'" if missing else "any layer"
            raise QuantkitError(
                f"quantization_config: {what} of the checkpoint is no linear of {type(model).__name__}; "
                "config.json does not fit this model or this version of transformers."
            )
        if self.quantization_config.kv is not None:
            quantise_kv(model, self.quantization_config.kv)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        share_inputs(model)
        fuse_inputs(model)
        prepare_all(model)
        if self.quantization_config.kv is not None:
            choose_attention(model, attentions(model), None)  # now: it depends on where the weights are
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Keep the renamings; drop the merging of experts into parameters that no longer exist."""
        if not self._experts_replaced:
            return weight_conversions
        return [conversion for conversion in weight_conversions if not _merges_experts(conversion)]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _replace_linears(model: nn.Module, formats: LayerFormats) -> set[str]:
    """Put a ``QuantLinear`` in the place of each quantised linear; returns their names."""
    replaced = set()
    for name, module in list(model.named_modules()):
        layer = formats.of(name) if isinstance(module, nn.Linear) else None
        if layer is not None:
            shape, bias = module.weight.shape, module.bias is not None
            model.set_submodule(name, _linear(layer, shape, bias, module.weight.dtype))
            replaced.add(name)
    return replaced


def _linear(layer: LayerFormat | None, shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> nn.Module:
    """An empty linear for a weight of ``shape`` (out_features, in_features)."""
    out_features, in_features = shape
    if layer is None:
        return nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype)
    return QuantLinear(in_features, out_features, bias, layer, dtype, device="meta")


def _replace_experts(model: PreTrainedModel, formats: LayerFormats) -> set[str]:
    """Put ``QuantExperts`` in the place of every merged expert module, if any expert of the model is quantised.

    All or none: whether a checkpoint's experts are merged while loading is decided for the whole model.

    Returns:
        The names of the quantised experts' linears.
    """
    merged = {name: module for name, module in model.named_modules() if _is_merged_experts(module)}
    if not merged:
        return set()
    names = _expert_names(model)
    layers = {
        f"{path}.{index}.{linear}": formats.of(f"{path}.{index}.{linear}")
        for path, module in merged.items()
        for index in range(module.gate_up_proj.shape[0])
        for linear in names
    }
    if not any(layers.values()):
        return set()
    for path, module in merged.items():
        odd = [flag for flag in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, flag, False)]
        if odd:
            raise QuantkitError(
                f"{path} ({type(module).__name__}) has {odd[0]}, which quantkit's experts do not; leave the experts in "
                f"full precision: ignore '{path}.*'."
            )
        count, doubled, hidden = module.gate_up_proj.shape
        inward, outward, dtype = (doubled // 2, hidden), (hidden, doubled // 2), module.gate_up_proj.dtype
        experts = [
            (
                _linear(layers[f"{path}.{index}.{names.gate}"], inward, False, dtype),
                _linear(layers[f"{path}.{index}.{names.up}"], inward, False, dtype),
                _linear(layers[f"{path}.{index}.{names.down}"], outward, False, dtype),
            )
            for index in range(count)
        ]
        model.set_submodule(path, QuantExperts(experts, names, module.act_fn))
    return {name for name, layer in layers.items() if layer is not None}


def _is_merged_experts(module: nn.Module) -> bool:
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def _expert_names(model: PreTrainedModel) -> ExpertNames:
    """How the model's checkpoints call the projections of one expert, from transformers' rules for merging them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    names = ExpertNames()
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        if _merges_experts(conversion):
            sources = [source.removesuffix(".weight").rpartition(".")[2] for source in conversion.source_patterns]
            if len(sources) == 2:
                names = names._replace(gate=sources[0], up=sources[1])
            else:
                names = names._replace(down=sources[0])
    return names


def _merges_experts(conversion: WeightTransform) -> bool:
    """Does ``conversion`` build a 3-D expert parameter?"""
    from transformers.core_model_loading import WeightConverter

    return isinstance(conversion, WeightConverter) and conversion.target_patterns[0].endswith(
        ("experts.gate_up_proj", "experts.down_proj")
    )


if NATIVE_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(NATIVE_METHOD)(QuantkitConfig)
    register_quantizer(NATIVE_METHOD)(QuantkitHfQuantizer)
