"""What a cache takes: counted from the tensors that it keeps alive, not worked out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import Cache

from quantkit.kv.cache import QuantisedLayer


@dataclass(frozen=True)
class MemoryReport:
    """What a cache takes."""

    bytes: int
    """Of the storage of every tensor that it keeps alive."""
    elements: int
    """Keys and values that it stands for: 2 * layers * batch * heads * tokens * head_dim, if all layers keep all."""

    @property
    def bits_per_element(self) -> float:
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def times_smaller(self) -> float:
        """Than the same keys and values in bfloat16."""
        return 2 * self.elements / self.bytes if self.bytes else 0.0

    def describe(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self) | {"bits_per_element": self.bits_per_element, "times_smaller": self.times_smaller}


def memory_report(cache: Cache) -> MemoryReport:
    """What ``cache`` takes; keys and values in full precision count, too."""
    storages: dict[int, int] = {}
    elements = 0
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, QuantisedLayer):
            tensors, count = list(layer.tensors()), layer.elements
        else:
            tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
            count = sum(tensor.numel() for tensor in tensors)
        elements += count
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return MemoryReport(sum(storages.values()), elements)
