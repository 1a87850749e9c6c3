"""Quantised checkpoints built by hand from a float one, so that formats and loading are tested without the pipeline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkit.formats.config import native_config, portable_config
from quantkit.formats.layer import LayerFormat, LayerInputs, to_tensors
from quantkit.formats.quantized import NF4_LEVELS, QuantizedWeight
from quantkit.kernels.online import restore
from quantkit.recipe import Scheme

_IN_A_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.\d+\..*")
_EXPERT = re.compile(r".*\.experts\.\d+\.\w+")


def layer_format(scheme: str, **settings: Any) -> LayerFormat:
    """``layer_format("W3ZA16G64", input_scale=True)``."""
    parsed = Scheme.parse(scheme)
    assert parsed.weights is not None
    return LayerFormat(weights=parsed.weights, activations=parsed.activations, **settings)


def layer_inputs(
    layer: LayerFormat, in_features: int, seed: int = 3, dtype: torch.dtype = torch.float32
) -> LayerInputs:
    """Numbers for whatever ``layer`` does to its input; a static range of about -4 .. 4."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.rand(2, in_features, generator=generator).add(0.5).to(dtype)
    op = layer.input_op
    left = layer.input_left or 1
    square = torch.eye(in_features) + torch.randn(in_features, in_features, generator=generator) / in_features
    static = layer.activations if layer.activations and not layer.activations.dynamic else None
    return LayerInputs(
        scale=vector[0] if layer.input_scale else None,
        shift=vector[1] - 1 if layer.input_shift else None,
        signs=(vector[0] - 1).sign().to(torch.int8) if op == "hadamard" else None,
        left=square[:left, :left].to(dtype) if op == "kronecker" else None,
        right=square[: in_features // left, : in_features // left].to(dtype) if op == "kronecker" else None,
        matrix=square.to(dtype) if op == "dense" else None,
        static_scale=torch.tensor([8 / (2**static.bits - 1)], dtype=dtype) if static else None,
        static_zero_point=torch.tensor([-2], dtype=torch.int8) if static and not static.symmetric else None,
        clip=torch.rand(2, generator=generator).mul(0.4).add(0.5).to(dtype) if layer.input_clip else None,
    )


def round_to_nearest(weight: Tensor, layer: LayerFormat, dtype: torch.dtype) -> QuantizedWeight:
    """Plain min/max rounding of ``weight`` [O, I], slow and obvious; the scale is rounded to ``dtype`` first."""
    weight, scheme = weight.float(), layer.weights
    groups = layer.groups(weight.shape[1])
    width = weight.shape[1] if groups == 1 else scheme.group_size
    codes, scales, zero_points = [], [], []
    top = 2**scheme.bits - 1
    for part in weight.split(width, dim=1):
        absmax = part.abs().amax(dim=1, keepdim=True)
        if scheme.levels == "nf4":
            scale = absmax.to(dtype)
            codes.append((part / scale.float()).unsqueeze(-1).sub(NF4_LEVELS).abs().argmin(dim=-1))
        elif scheme.symmetric:
            scale = (absmax / (top / 2)).to(dtype)
            codes.append((part / scale.float()).round().add(2 ** (scheme.bits - 1)).clamp(0, top))
        else:
            low = part.amin(dim=1, keepdim=True).clamp(max=0)
            scale = ((part.amax(dim=1, keepdim=True).clamp(min=0) - low) / top).to(dtype)
            zero_points.append((-low / scale.float()).round().clamp(0, top))
            codes.append((part / scale.float() + zero_points[-1]).round().clamp(0, top))
        scales.append(scale)
    return QuantizedWeight(
        codes=torch.cat(codes, dim=1).to(torch.uint8),
        scale=torch.cat(scales, dim=1),
        zero_point=torch.cat(zero_points, dim=1).to(torch.uint8) if zero_points else None,
        bits=scheme.bits,
        group_size=scheme.group_size,
        levels=scheme.levels,
    )


def quantise(
    source: Path,
    out: Path,
    choose: Callable[[str], LayerFormat | None],
    kind: Literal["native", "portable"],
    dense: Path | None = None,
) -> dict[str, LayerFormat]:
    """Write a quantised copy of the model in ``source``.

    Args:
        choose: module name of a linear inside the blocks -> its format, or None to keep it as it is.
        dense: folder for the float model that has the dequantised weights.

    Returns:
        Module name -> format of what was quantised.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    formats: dict[str, LayerFormat] = {}
    kept = {name for name in linears if not _IN_A_BLOCK.fullmatch(name)}
    for tensor_name, tensor in load_file(source / "model.safetensors").items():
        stored_name = tensor_name.removesuffix(".weight")
        name = stored_name.replace(".block_sparse_moe.", ".mlp.")
        is_linear = tensor_name.endswith(".weight") and (name in linears or _EXPERT.fullmatch(name))
        layer = choose(name) if is_linear and name not in kept else None
        if layer is None:
            packed[tensor_name] = floats[tensor_name] = tensor
            if is_linear:
                kept.add(name)
            continue
        formats[name] = layer
        inputs = layer_inputs(layer, tensor.shape[1], len(formats), tensor.dtype)
        weight = round_to_nearest(tensor, layer, tensor.dtype)
        packed |= {f"{stored_name}.{suffix}": part for suffix, part in to_tensors(weight, layer, inputs).items()}
        dense_weight = restore(weight.dequantize(tensor.dtype), inputs)
        floats[tensor_name] = dense_weight * (1 if inputs.scale is None else inputs.scale)
    block = (native_config if kind == "native" else portable_config)(formats, sorted(kept))
    _save(source, out, packed, block)
    if dense is not None:
        _save(source, dense, floats, None)
    return formats


def _save(source: Path, out: Path, tensors: dict[str, Tensor], block: dict[str, Any] | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if block is not None:
        config["quantization_config"] = block
    (out / "config.json").write_text(json.dumps(config, indent=2))


def load_plain(folder: Path, **settings: Any) -> PreTrainedModel:
    """Plain ``from_pretrained``, which must find every tensor it wants and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **settings)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model


def logits(model: PreTrainedModel, batch: int = 2, length: int = 13) -> Tensor:
    """float32 [batch, length, vocabulary] for fixed random tokens."""
    tokens = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        result: Tensor = model(tokens, use_cache=False).logits.float()
    return result


def assert_saved_as_loaded(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Every tensor byte for byte, under the same names, and the same quantization_config."""
    model.save_pretrained(out)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    blocks = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (source, out)]
    assert blocks[0] == blocks[1]
