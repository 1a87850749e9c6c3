"""What a quantised folder holds, layer by layer, read from its headers and its run record."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantkitError
from quantkit.formats.config import read_config, read_kv
from quantkit.formats.kv import AnyKV
from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import RUN_RECORD, read_record
from quantkit.kernels.online import operations
from quantkit.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class LayerReport:
    """One quantised linear as stored."""

    name: str
    format: LayerFormat
    out_features: int
    in_features: int
    stored_bytes: int
    dtype: torch.dtype
    """Of the scales, and so of inputs and outputs."""
    error: float | None
    """Relative Frobenius weight error from the run record; None without a record."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / (self.out_features * self.in_features)

    @property
    def online_operations(self) -> int:
        """What multiplying the input by a matrix costs per token; the weight itself costs 2 * out * in."""
        return operations(self.format, self.in_features)


@dataclass(frozen=True)
class CheckpointReport:
    """A whole folder."""

    method: str
    layers: tuple[LayerReport, ...]
    total_bytes: int
    record: tuple[dict[str, Any], ...]
    kv: AnyKV | None
    """How the model keeps keys and values; None: in full precision."""

    @property
    def online_share(self) -> float:
        """Operations of matrices that inputs are multiplied by, over those of the quantised linears."""
        products = sum(2 * layer.out_features * layer.in_features for layer in self.layers)
        return sum(layer.online_operations for layer in self.layers) / products

    @property
    def bits_per_weight(self) -> float:
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        return 8 * sum(layer.stored_bytes for layer in self.layers) / weights


def inspect_checkpoint(folder: Path) -> CheckpointReport:
    """Read headers, shapes and the run record of ``folder``; no weight is read.

    Raises:
        QuantkitError: ``folder`` is no model, or not a quantised one.
    """
    path = folder / "config.json"
    if not path.exists():
        raise QuantkitError(f"{folder} has no config.json: name a folder written by `quantkit quantize`.")
    block = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if block is None:
        raise QuantkitError(f"{folder} is not quantised (no quantization_config in config.json); quantise it first.")
    formats = read_config(block)
    checkpoint = Checkpoint.open(folder)
    record = read_record(folder / RUN_RECORD) if (folder / RUN_RECORD).exists() else []
    rows = [row for event in record for row in event.get("layers", ())]
    errors = {row["stored"]: row["error"] for row in rows}
    # config.json names modules; the stored name may differ from it (Mixtral), and the record knows both.
    modules = {row["stored"]: row["layer"] for row in rows}
    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, info in checkpoint.names.items():
        stored, _, suffix = name.rpartition(".")
        sizes[stored] = sizes.get(stored, 0) + checkpoint.nbytes_of(name) * (suffix != "bias")
        if suffix == "weight_shape":
            out_features, in_features = checkpoint.read(name).tolist()
            shapes[stored] = (out_features, in_features)
        elif suffix == "weight" and f"{stored}.weight_scale" in checkpoint.names:
            shapes.setdefault(stored, (info.shape[0], info.shape[1]))
    layers = []
    for stored, shape in shapes.items():
        layer = formats.of(modules.get(stored, stored))
        if layer is not None:
            dtype = checkpoint.names[f"{stored}.weight_scale"].dtype
            layers.append(LayerReport(stored, layer, *shape, sizes[stored], dtype, errors.get(stored)))
    if not layers:
        raise QuantkitError(
            f"{folder}: config.json announces {block.get('quant_method')} but no layer of it is stored."
        )
    layers.sort(key=lambda layer: _natural(layer.name))
    total = sum(checkpoint.nbytes_of(name) for name in checkpoint.names)
    return CheckpointReport(str(block["quant_method"]), tuple(layers), total, tuple(record), read_kv(block))


def _natural(name: str) -> list[tuple[float, str]]:
    """Sort key in which layer 10 follows layer 9."""
    return [(int(part), "") if part.isdigit() else (math.inf, part) for part in name.split(".")]
