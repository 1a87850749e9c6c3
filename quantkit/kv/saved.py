"""A cache as a safetensors file: what is held, as it is held, so that a model goes on exactly where it stopped.

layer number.name     tensors of each layer: codes, ranges, tokens that are not encoded yet
metadata              format, version; kv: what the quantised layers were made of; layers: the kind of each
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantkit.errors import QuantkitError
from quantkit.formats.kv import AnyKV, parse_kv
from quantkit.formats.writer import write_atomic
from quantkit.kv.attach import attentions, empty_cache
from quantkit.kv.cache import KVCache, QuantisedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT, _VERSION = "quantkit-kv-cache", "1"


def save_cache(cache: KVCache, path: Path) -> None:
    """Write ``cache`` into ``path``, whole or not at all.

    Raises:
        QuantkitError: a layer is of a kind that cannot be saved, or the file cannot be written.
    """
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, layer in enumerate(cache.layers)
        for name, tensor in _state(number, layer).items()
    }
    if cache.kv is not None:
        _kv(path, {"kv": cache.kv.model_dump_json()})  # what could not be read again is not written
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "kv": json.dumps(None if cache.kv is None else cache.kv.model_dump(mode="json")),
        "layers": json.dumps([type(layer).__name__ for layer in cache.layers]),
    }
    try:
        write_atomic(path, save(tensors, metadata))
    except OSError as error:
        raise QuantkitError(f"cannot write {path}: {error.strerror or error}.") from None


def load_cache(path: str | Path, model: PreTrainedModel) -> KVCache:
    """The cache that ``KVCache.save`` wrote into ``path``, for the model that it was filled by.

    Raises:
        QuantkitError: no such file, no cache, a damaged one, or one of another model.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    cache = empty_cache(model, _kv(path, metadata))
    stored, ours = json.loads(metadata.get("layers", "[]")), [type(layer).__name__ for layer in cache.layers]
    if stored != ours:
        raise QuantkitError(
            f"{path} holds {len(stored)} layers ({_counted(stored)}) and this {type(model).__name__} has {len(ours)} "
            f"({_counted(ours)}): it is of another model."
        )
    for one in attentions(model):
        states = {name.partition(".")[2]: part for name, part in tensors.items() if name.startswith(f"{one.layer}.")}
        device = next((tensor.device for tensor in one.module.parameters()), model.device)
        try:
            _load(cache.layers[one.layer], {name: part.to(device) for name, part in states.items()})
        except KeyError as error:
            raise QuantkitError(f"{path} has no tensor '{one.layer}.{error.args[0]}': it is damaged.") from None
    return cache


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise QuantkitError(f"cannot read {path}: {error}; name a file written by save() of a cache.") from None
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise QuantkitError(f"{path} is no cache that this version of quantkit has saved.")
    return metadata, tensors


def _kv(path: Path, metadata: dict[str, str]) -> AnyKV | None:
    try:
        entry = json.loads(metadata["kv"])
        return None if entry is None else parse_kv(entry)
    except (KeyError, ValueError, ValidationError) as error:
        message = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise QuantkitError(
            f"{path}: its cache cannot be made again: {message.removeprefix('Value error, ')}."
        ) from None


def _state(number: int, layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, QuantisedLayer):
        return layer.state()
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise QuantkitError(f"layer {number} of the cache is a {type(layer).__name__}, which cannot be saved.")
    if not layer.is_initialized:
        return {}
    return {"keys": layer.keys, "values": layer.values, "seen": torch.tensor(layer.get_seq_length())}


def _load(layer: Any, state: dict[str, Tensor]) -> None:
    if isinstance(layer, QuantisedLayer):
        layer.load(state)
    elif state:
        layer.lazy_initialization(state["keys"], state["values"])
        layer.keys, layer.values = state["keys"], state["values"]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = int(state["seen"])


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
