"""A whole model, quantised against dense, in one run: tokens per second of decoding, seconds of a prefill, memory.

Weights are random (the time does not depend on them), except those of a quantised checkpoint. Each decoding step reads
all weights, so no copies are needed to get past the cache of the device.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from quantkit.errors import QuantkitError
from quantkit.eval.bench_kernels import DENSE, Wanted, random_layer
from quantkit.eval.decoding import Decoding, GraphDecoding
from quantkit.eval.harness import Timing, compare
from quantkit.kernels import dispatch
from quantkit.layers.fusing import fuse_inputs
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.sharing import share_inputs
from quantkit.loading import check_writes_text, load
from quantkit.models.source import load_config, resolve
from quantkit.process import give_back_memory, rss

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip
"""Name of a model that exists as a shape only -> fields of its ``LlamaConfig``."""


class Row(NamedTuple):
    """One model."""

    name: str
    decode: Timing
    """Of one token, seconds."""
    prefill: Timing | None
    """Of the whole prompt, seconds."""
    speedup: float
    """In decoding: seconds of the dense model over those of this one."""
    prefill_speedup: float | None
    weight_bytes: int
    """Of all parameters, buffers and kernel layouts."""
    resident_bytes: int | None
    """By how much the process grew when the model was made; None: it is on a GPU."""


@dataclass(frozen=True)
class Subject:
    """A model to be timed."""

    name: str
    model: PreTrainedModel
    resident_bytes: int | None


def bench(
    model: str,
    schemes: Mapping[str, Wanted],
    dtype: torch.dtype,
    device: torch.device,
    *,
    prompt: int = 16,
    tokens: int = 16,
    prefill: int = 0,
    batch: int = 1,
    rounds: int = 10,
    trust_remote_code: bool = False,
) -> list[Row]:
    """Time ``model`` dense and quantised, in turns.

    Args:
        model: a name of ``SHAPES``, a quantised checkpoint (timed as it is), or any other model (its shape is used).
        schemes: what the linears of the blocks become; not for a quantised checkpoint.
        prompt: tokens in the cache before the first step that is timed.
        tokens: steps of a round.
        prefill: tokens of a prompt that is timed; 0: none.
        rounds: at least three.

    Raises:
        QuantkitError: no such model, or one that does not predict the next token.
    """
    config, quantised = model_config(model, trust_remote_code)
    subjects = []
    if quantised is not None:
        subjects.append(_measured(quantised.name, device, partial(_checkpoint, quantised, dtype, device)))
    else:
        for name, wanted in schemes.items():
            subjects.append(_measured(name, device, partial(_random, config, wanted, dtype, device)))
    subjects.insert(0, _measured(DENSE, device, partial(_random, config, None, dtype, device)))
    with torch.inference_mode():
        start = torch.randint(config.get_text_config().vocab_size, (batch, prompt), device=device)
        steps = GraphDecoding if device.type == "cuda" else Decoding
        decoders = {one.name: steps(one.model, start, tokens) for one in subjects}
        decode = compare(decoders, device, rounds=rounds, warmup=1)
        before = {}
        if prefill:
            ids = torch.randint(config.get_text_config().vocab_size, (batch, prefill), device=device)
            runs = {one.name: partial(_prefill, one.model, ids) for one in subjects}
            before = compare(runs, device, rounds=rounds, warmup=1)
    per_token = {
        name: Timing(t.median / tokens, t.p20 / tokens, t.p80 / tokens, t.rounds) for name, t in decode.items()
    }
    return [
        Row(
            one.name,
            per_token[one.name],
            before.get(one.name),
            per_token[DENSE].median / per_token[one.name].median,
            before[DENSE].median / before[one.name].median if before else None,
            weight_bytes(one.model),
            one.resident_bytes,
        )
        for one in subjects
    ]


def report(rows: Sequence[Row], batch: int) -> list[dict[str, Any]]:
    """For a JSON file."""
    return [
        {
            "model": row.name,
            "tokens_per_second": batch / row.decode.median,
            "decode": row.decode._asdict(),
            "speedup": row.speedup,
            "prefill": row.prefill and row.prefill._asdict(),
            "prefill_speedup": row.prefill_speedup,
            "weight_bytes": row.weight_bytes,
            "resident_bytes": row.resident_bytes,
        }
        for row in rows
    ]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of every storage that the model keeps alive, what kernels made of its weights included."""
    layouts = (
        module.runtime.packed for module in model.modules() if isinstance(module, QuantLinear) and module.runtime
    )
    found = [*model.parameters(), *model.buffers(), *(tensor for packed in layouts for tensor in _tensors(packed))]
    return sum(dict(_storage(tensor) for tensor in found).values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What tells it from other storages, and its bytes."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # oneDNN's own order, which torch cannot look into
        return id(tensor), tensor.numel() * tensor.element_size()
    return storage.data_ptr(), storage.nbytes()


def _prefill(model: PreTrainedModel, ids: Tensor, number: int) -> None:
    model(input_ids=ids, logits_to_keep=1, use_cache=True)


def model_config(model: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, Path | None]:
    """The configuration of what ``bench`` takes as a model, and the folder if it is a quantised checkpoint."""
    if model in SHAPES and not Path(model).exists():
        return LlamaConfig(max_position_embeddings=8192, **SHAPES[model]), None
    folder = resolve(model, trust_remote_code=trust_remote_code, allow_quantized=True)
    config = load_config(folder, trust_remote_code)
    quantised = folder if getattr(config, "quantization_config", None) else None
    if quantised is not None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        del config.quantization_config
    return config, quantised


def _measured(name: str, device: torch.device, make: Callable[[], PreTrainedModel]) -> Subject:
    give_back_memory()
    before = rss()
    model = make()
    check_writes_text(model, "decoding")
    dispatch.prepare_all(model)
    gc.collect()
    give_back_memory()
    return Subject(name, model, rss() - before if device.type == "cpu" else None)


def _checkpoint(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model, _ = load(folder, dtype=dtype, device_map=None if device.type == "cpu" else str(device))
    return model


def _random(
    config: PreTrainedConfig, wanted: Wanted | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model of ``config`` with random weights; the linears of its blocks are quantised as ``wanted`` says."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if wanted is not None:
        made: dict[tuple[int, int], QuantLinear] = {}
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                shape = module.out_features, module.in_features
                made.setdefault(shape, random_layer(wanted, *shape, dtype, device))
                model.set_submodule(name, copy.deepcopy(made[shape]))
        if not made:
            raise QuantkitError(f"{type(model).__name__} has no linears in its blocks that could be quantised.")
        share_inputs(model)
        fuse_inputs(model)
    return model.eval()


def _tensors(packed: Any) -> list[Tensor]:
    """The tensors in what a layout's ``pack`` returned."""
    if isinstance(packed, Tensor):
        return [packed]
    parts = (
        packed if isinstance(packed, (tuple, list)) else vars(packed).values() if hasattr(packed, "__dict__") else ()
    )
    return [tensor for part in parts for tensor in _tensors(part)]
