"""How a checkpoint says that its model keeps keys and values quantised: ``kv_cache`` in ``quantization_config``.

    {"bits": 4, "symmetric": false, "clip": 1.0, ...}         ``KVFormat``: what KV2 .. KV8 of a scheme means
    {"method": "kivi", "bits": 2, "group_size": 32, ...}      ``CacheFormat``: any other method of ``kv/methods.py``

Of a ``KVFormat`` there are tensors under the name of each attention, in the dtype of scales, if they were learned:

    key_matrix    [head_dim, head_dim]    key_transform: dense    keys are multiplied by it from the right
    key_clip      [2]                     learned_clips           shares of the lower and upper end of their ranges
    value_clip    [2]                     learned_clips
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.kv import methods
from quantkit.recipe import KVScheme


@dataclass(frozen=True)
class LearnedKV:
    """What was learned about keys and values of one attention; named as it is stored."""

    key_clip: Tensor
    """[2], above 0 and at most 1."""
    value_clip: Tensor
    key_matrix: Tensor | None = None
    """[head_dim, head_dim], the same for all heads. As it is held: its inverse makes up for any rounding of it."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> LearnedKV:
        return LearnedKV(**{name: tensor.to(dtype) for name, tensor in self.tensors().items()})


class KVFormat(BaseModel):
    """The same for all layers, with nothing left to decide; the arithmetic is in ``kv/quantiser.py``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=2, le=8, description="width of a code")
    symmetric: bool = Field(description="no zero point")
    clip: float = Field(gt=0, le=1, description="share of the range of a token and head that its grid covers")
    key_transform: Literal["none", "hadamard", "dense"] = Field(
        description="matrix that keys are multiplied by first; dense: a stored one for each layer"
    )
    seed: int = Field(ge=0, description="of the signs of the Hadamard matrices")
    learned_clips: bool = Field(False, description="stored shares of the range for each layer, in the place of clip")

    by_token: ClassVar[bool] = True

    @classmethod
    def of(cls, scheme: KVScheme, seed: int) -> KVFormat:
        return cls(
            bits=scheme.bits,
            symmetric=scheme.symmetric,
            clip=scheme.clip,
            key_transform=scheme.transform,
            seed=seed,
        )

    def to_be_learned(self) -> KVFormat:
        """The same for tensors in the place of what is fixed here; keys that are not rotated stay so."""
        transform = "none" if self.key_transform == "none" else "dense"
        return self.model_copy(update={"key_transform": transform, "learned_clips": True})

    def tensor_shapes(self, key_dim: int) -> dict[str, tuple[int, ...]]:
        """What an attention with keys of ``key_dim`` numbers holds."""
        matrix: dict[str, tuple[int, ...]] = {"key_matrix": (key_dim, key_dim)} if self.key_transform == "dense" else {}
        return matrix | ({"key_clip": (2,), "value_clip": (2,)} if self.learned_clips else {})

    def stored_bytes(self, key_dim: int, dtype: torch.dtype) -> int:
        """Of these tensors in ``dtype``."""
        return dtype.itemsize * sum(prod(shape) for shape in self.tensor_shapes(key_dim).values())

    def describe(self) -> str:
        """In words, behind "keys and values"."""
        zero = "a step" if self.symmetric else "a step and a zero point"
        text = f"{self.bits}-bit codes, {zero} per token and head"
        if self.learned_clips:
            text += ", learned shares of the range"
        elif self.clip < 1:
            text += f", {self.clip:g} of the range"
        if self.key_transform == "dense":
            return f"{text}; keys multiplied by learned matrices"
        return text if self.key_transform == "none" else f"{text}; keys rotated ({self.key_transform})"


class CacheFormat(BaseModel):
    """Keys and values by a method of ``kv/methods.py``: its name and its settings side by side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    config: Any
    """The method's own, checked."""

    learned_clips: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _settings_are_the_methods(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or isinstance(data.get("config"), BaseModel):
            return data
        settings = {key: value for key, value in data.items() if key != "method"}
        try:
            row, config = methods.request(str(data.get("method")), settings)
            row.check_no_file(config)
        except RecipeError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        if isinstance(config, KVScheme):
            raise ValueError(f"method '{row.name}' is stored without its name, as bits, symmetric, clip ...")
        return {"method": row.name, "config": config}

    @model_serializer
    def _side_by_side(self) -> dict[str, Any]:
        return {"method": self.method, **self.config.model_dump(mode="json")}

    @property
    def by_token(self) -> bool:
        """Each token is kept by itself."""
        return methods.get(self.method).by_token

    def tensor_shapes(self, key_dim: int) -> dict[str, tuple[int, ...]]:
        """Nothing is learned, so attention holds nothing."""
        return {}

    def stored_bytes(self, key_dim: int, dtype: torch.dtype) -> int:
        return 0

    def describe(self) -> str:
        """In words, behind "keys and values"."""
        text: str = self.config.describe()
        return text


AnyKV = KVFormat | CacheFormat


def kv_of(name: str, settings: Mapping[str, Any] | None = None, seed: int = 0) -> AnyKV | None:
    """What ``name`` of ``kv/methods.py`` (with ``settings``) stands for; None: ``none``, full precision.

    Args:
        seed: of the signs of Hadamard matrices in front of evenly spaced codes.

    Raises:
        RecipeError: no such method or setting, with the nearest known one, or a value that a setting cannot have.
    """
    if name.strip().lower() == methods.NONE and not settings:
        return None
    row, config = methods.request(name, settings)
    if isinstance(config, KVScheme):
        return KVFormat.of(config, seed)
    return CacheFormat(method=row.name, config=config)


def parse_kv(entry: Any) -> AnyKV:
    """``entry`` as it is stored.

    Raises:
        pydantic.ValidationError: it is nothing that this version writes.
    """
    kind: type[AnyKV] = CacheFormat if isinstance(entry, Mapping) and "method" in entry else KVFormat
    return kind.model_validate(entry)
