"""How a checkpoint says that its model keeps keys and values quantised: ``kv_cache`` in ``quantization_config``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantkit.recipe import KVScheme


class KVFormat(BaseModel):
    """The same for all layers, with nothing left to decide; the arithmetic is in ``kv/quantiser.py``.

    Keys and values are computed when the model runs, so no tensor of the checkpoint belongs to this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=2, le=8, description="width of a code")
    symmetric: bool = Field(description="no zero point")
    clip: float = Field(gt=0, le=1, description="share of the range of a token and head that its grid covers")
    key_transform: Literal["none", "hadamard"] = Field(description="matrix that keys are multiplied by first")
    seed: int = Field(ge=0, description="of the signs of the Hadamard matrices")

    @classmethod
    def of(cls, scheme: KVScheme, seed: int) -> KVFormat:
        return cls(
            bits=scheme.bits,
            symmetric=scheme.symmetric,
            clip=scheme.clip,
            key_transform=scheme.transform,
            seed=seed,
        )

    def describe(self) -> str:
        """In words, behind "keys and values"."""
        zero = "a step" if self.symmetric else "a step and a zero point"
        text = f"{self.bits}-bit codes, {zero} per token and head"
        text += f", {self.clip:g} of the range" if self.clip < 1 else ""
        return text if self.key_transform == "none" else f"{text}; keys rotated ({self.key_transform})"
