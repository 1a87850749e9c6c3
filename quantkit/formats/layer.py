"""The tensors of one quantised linear in a checkpoint: how they are named, shaped, and turned into codes and back.

``packed`` storage (compressed-tensors ``pack-quantized``; for zero points, odd widths, NF4 and short groups the same
tensors in the native format), for a weight [O, I] with b bits and groups of G columns:

    weight_packed        int32        [O, ceil(I * b / 32)]            codes, see packing.py
    weight_scale         model dtype  [O, groups]                      groups = ceil(I / G), or 1 per channel
    weight_shape         int64        [2]                              O, I
    weight_zero_point    int32        [ceil(O * b / 32), groups]       only when not symmetric; packed along O

``int8`` storage (compressed-tensors ``int-quantized``): ``weight`` int8 [O, I], signed, and ``weight_scale``.

Either comes with what is done to the input at run time, in this order:

    input_scale_vector   model dtype  [I]                              only with ``input_scale``: x * vector
    input_shift_vector   model dtype  [I]                              only with ``input_shift``: then + vector
    input_hadamard_signs int8         [I]                              ``input_op: hadamard``: +-1, kernels/online.py
    input_kronecker_left, _right      [a, a], [b, b]   model dtype     ``kronecker``: a = ``input_left``, a * b = I
    input_dense          model dtype  [I, I]                           ``dense``
    input_scale          model dtype  [1]                              only with static activations: the rounding's step
    input_zero_point     int8         [1]                              only when those are not symmetric; signed
    input_clip           model dtype  [2]                              only with ``input_clip``, dynamic activations

A zero point is stored as the unsigned number it is. compressed-tensors stores signed zero points shifted by
2**(b-1), which puts the same bits into the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from quantkit.formats.packing import pack_rows, pack_zero_points, unpack_rows, unpack_zero_points, words_per_row
from quantkit.formats.quantized import QuantizedWeight
from quantkit.recipe import PER_CHANNEL, ActivationScheme, Scheme, WeightScheme

InputOp = Literal["none", "hadamard", "kronecker", "dense"]
"""An invertible matrix that the input of a linear is multiplied by at run time (``kernels/online.py``)."""


class LayerFormat(BaseModel):
    """How one linear is stored and run, with nothing left to decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightScheme = Field(description="``symmetric`` is filled in when it was left open")
    activations: ActivationScheme | None = Field(default=None, description="quantisation of the input at run time")
    input_scale: bool = Field(
        default=False, description="the input is first multiplied by a stored vector [in_features]"
    )
    input_shift: bool = Field(default=False, description="a stored vector [in_features] is added to the (scaled) input")
    input_op: InputOp = Field(default="none", description="the (scaled and shifted) input is multiplied by a matrix")
    input_left: int | None = Field(
        default=None, ge=1, description="kronecker: rows of the left factor; those of the right: in_features / this"
    )
    input_clip: bool = Field(
        default=False, description="dynamic activations: stored shares [2] of either end of every range are kept"
    )
    storage: Literal["packed", "int8"] = Field(
        default="packed", description="left out: int8 for symmetric 8-bit weights with 8-bit activations, else packed"
    )

    @field_validator("weights")
    @classmethod
    def _symmetric_is_decided(cls, weights: WeightScheme) -> WeightScheme:
        return weights.model_copy(update={"symmetric": weights.is_symmetric})

    @model_validator(mode="after")
    def _left_belongs_to_kronecker(self) -> LayerFormat:
        if (self.input_op == "kronecker") != (self.input_left is not None):
            raise ValueError(f"input_left is {self.input_left} with input_op {self.input_op}; kronecker alone needs it")
        return self

    @model_validator(mode="after")
    def _clip_belongs_to_dynamic_activations(self) -> LayerFormat:
        if self.input_clip and (self.activations is None or not self.activations.dynamic):
            raise ValueError("input_clip needs dynamic activations: only these have a range of their own to be clipped")
        return self

    @model_validator(mode="after")
    def _storage_follows_from_the_scheme(self) -> LayerFormat:
        whole_bytes = self.weights.bits == 8 and self.weights.symmetric
        if "storage" not in self.model_fields_set:
            both = whole_bytes and self.activations is not None and self.activations.bits == 8
            object.__setattr__(self, "storage", "int8" if both else "packed")  # frozen for everyone else
        elif self.storage == "int8" and not whole_bytes:
            raise ValueError("storage int8 holds symmetric 8-bit weights only; use storage: packed")
        return self

    def describe(self) -> str:
        """``W4SA16G64``; `` x t``, `` + s``, `` hadamard`` and `` clip`` behind it where that is done to the input."""
        name = Scheme(weights=self.weights, activations=self.activations).name
        name += " x t" * self.input_scale + " + s" * self.input_shift
        name += "" if self.input_op == "none" else f" {self.input_op}"
        return name + " clip" * self.input_clip

    def with_inputs(self, inputs: LayerInputs) -> LayerFormat:
        """This format, doing to the input what ``inputs`` holds besides a static range."""
        left = None if inputs.left is None else len(inputs.left)
        return self.model_copy(
            update={
                "input_scale": inputs.scale is not None,
                "input_shift": inputs.shift is not None,
                "input_op": inputs.op,
                "input_left": left,
                "input_clip": inputs.clip is not None,
            }
        )

    def groups(self, in_features: int) -> int:
        """Scales per output row."""
        size = self.weights.group_size
        return 1 if size == PER_CHANNEL else -(-in_features // size)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What is done to the input of a linear at run time before it meets the weight, and is stored with it:

    round(op(x * scale + shift))    op: one of ``signs``, ``left`` and ``right``, ``matrix``
                                    round: to the grid of the layer's ``ActivationScheme``, of a range times ``clip``
    """

    scale: Tensor | None = None
    """[in_features] in the model dtype."""
    shift: Tensor | None = None
    """[in_features] in the model dtype."""
    signs: Tensor | None = None
    """[in_features] int8, +-1: v becomes H @ (signs * v) / sqrt(in_features), H of ``kernels/hadamard.py``."""
    left: Tensor | None = None
    """[a, a] in the model dtype: v, read as a matrix V [a, b], becomes left.T @ V @ right. Weights have to be
    multiplied by the inverse of the factors as they are stored, so no more than that dtype is needed."""
    right: Tensor | None = None
    """[b, b] in the model dtype."""
    matrix: Tensor | None = None
    """[in_features, in_features] in the model dtype: v becomes v @ matrix."""
    static_scale: Tensor | None = None
    """[1] in the model dtype: step of the grid; None: from the data at hand (or not calibrated yet)."""
    static_zero_point: Tensor | None = None
    """[1] int8, the code of 0, signed; None: symmetric, or no ``static_scale``."""
    clip: Tensor | None = None
    """[2] in the model dtype, above 0 and at most 1: shares of the lower and of the upper end of each token's (group's,
    tensor's) own range that its grid covers; what lies beyond is cut off. Dynamic activations only; None: all of it."""

    @property
    def op(self) -> InputOp:
        if self.signs is not None:
            return "hadamard"
        if self.left is not None:
            return "kronecker"
        return "none" if self.matrix is None else "dense"


_STORED_AS = {
    "scale": "input_scale_vector", "shift": "input_shift_vector", "signs": "input_hadamard_signs",
    "left": "input_kronecker_left", "right": "input_kronecker_right", "matrix": "input_dense",
    "static_scale": "input_scale", "static_zero_point": "input_zero_point", "clip": "input_clip",
}  # fmt: skip
"""Field of ``LayerInputs`` -> suffix of its tensor in a checkpoint."""


def tensor_specs(
    layer: LayerFormat, out_features: int, in_features: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> (shape, dtype) of every tensor that a quantised linear stores, its bias aside.

    Args:
        dtype: the model dtype, which scales are stored in.
    """
    groups, bits = layer.groups(in_features), layer.weights.bits
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if layer.storage == "int8":
        specs["weight"] = (out_features, in_features), torch.int8
    else:
        specs["weight_packed"] = (out_features, words_per_row(in_features, bits)), torch.int32
    specs["weight_scale"] = (out_features, groups), dtype
    if layer.storage == "packed":
        specs["weight_shape"] = (2,), torch.int64
    if not layer.weights.symmetric:
        specs["weight_zero_point"] = (words_per_row(out_features, bits), groups), torch.int32
    return specs | _input_specs(layer, in_features, dtype)


def _input_specs(
    layer: LayerFormat, in_features: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The part of ``tensor_specs`` that ``LayerInputs`` holds."""
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if layer.input_scale:
        specs["input_scale_vector"] = (in_features,), dtype
    if layer.input_shift:
        specs["input_shift_vector"] = (in_features,), dtype
    if layer.input_op == "hadamard":
        specs["input_hadamard_signs"] = (in_features,), torch.int8
    elif layer.input_op == "kronecker":
        left = layer.input_left or 1
        right = in_features // left
        specs["input_kronecker_left"], specs["input_kronecker_right"] = ((left, left), dtype), ((right, right), dtype)
    elif layer.input_op == "dense":
        specs["input_dense"] = (in_features, in_features), dtype
    if layer.activations and not layer.activations.dynamic:
        specs["input_scale"] = (1,), dtype
        if not layer.activations.symmetric:
            specs["input_zero_point"] = (1,), torch.int8
    if layer.input_clip:
        specs["input_clip"] = (2,), dtype
    return specs


def stored_bytes(layer: LayerFormat, out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of the tensors of ``tensor_specs``: exactly what the layer takes in a file, without its bias."""
    specs = tensor_specs(layer, out_features, in_features, dtype).values()
    return sum(torch.Size(shape).numel() * stored.itemsize for shape, stored in specs)


def to_tensors(qw: QuantizedWeight, layer: LayerFormat, inputs: LayerInputs = LayerInputs()) -> dict[str, Tensor]:
    """The tensors to store, by suffix.

    Args:
        qw: codes, scales and zero points that match ``layer``.
        inputs: exactly what ``layer`` says is stored; floats are stored in the dtype of the scales.

    Raises:
        ValueError: the arguments contradict each other (a bug of the caller).
    """
    return weight_tensors(qw, layer) | input_tensors(inputs, layer, qw.codes.shape[1], qw.scale.dtype)


def weight_tensors(qw: QuantizedWeight, layer: LayerFormat) -> dict[str, Tensor]:
    """The part of ``to_tensors`` that holds the weight."""
    symmetric = qw.zero_point is None
    weights = layer.weights
    if (qw.bits, qw.group_size, qw.levels, symmetric) != (
        weights.bits, weights.group_size, weights.levels, weights.symmetric,
    ):  # fmt: skip
        raise ValueError(f"the weight was quantised differently from what its format says: {weights}")
    tensors: dict[str, Tensor] = {}
    if layer.storage == "int8":
        tensors["weight"] = signed_from_codes(qw.codes)
        tensors["weight_scale"] = qw.scale
    else:
        tensors["weight_packed"] = pack_rows(qw.codes, qw.bits)
        tensors["weight_scale"] = qw.scale
        tensors["weight_shape"] = torch.tensor(qw.codes.shape, dtype=torch.int64)
    if qw.zero_point is not None:
        tensors["weight_zero_point"] = pack_zero_points(qw.zero_point, qw.bits)
    return tensors


def input_tensors(inputs: LayerInputs, layer: LayerFormat, in_features: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The part of ``to_tensors`` that is done to the input; ``dtype``: of the scales."""
    given = {suffix: getattr(inputs, name) for name, suffix in _STORED_AS.items() if getattr(inputs, name) is not None}
    specs = _input_specs(layer, in_features, dtype)
    for suffix in given.keys() ^ specs.keys():
        raise ValueError(f"{suffix} is {'missing' if suffix in specs else 'not part of the format'}")
    # Copies: linears that read one input may have their numbers in common, and a file takes no memory twice.
    return {
        suffix: given[suffix].to(stored, copy=True).reshape(shape).contiguous()
        for suffix, (shape, stored) in specs.items()
    }


def from_tensors(tensors: Mapping[str, Tensor], layer: LayerFormat) -> tuple[QuantizedWeight, LayerInputs]:
    """Inverse of ``to_tensors``: (codes and scales, what is done to the input)."""
    bits = layer.weights.bits
    if layer.storage == "int8":
        codes = codes_from_signed(tensors["weight"])
    else:
        codes = unpack_rows(tensors["weight_packed"], bits, int(tensors["weight_shape"][1]))
    zero_point = None
    if not layer.weights.symmetric:
        zero_point = unpack_zero_points(tensors["weight_zero_point"], bits, codes.shape[0])
    weight = QuantizedWeight(
        codes=codes,
        scale=tensors["weight_scale"],
        zero_point=zero_point,
        bits=bits,
        group_size=layer.weights.group_size,
        levels=layer.weights.levels,
    )
    return weight, inputs_from_tensors(tensors, layer)


def inputs_from_tensors(tensors: Mapping[str, Tensor | None], layer: LayerFormat) -> LayerInputs:
    """What is done to the input, out of the tensors of a linear by suffix."""
    stored = _input_specs(layer, 0, torch.float32)
    return LayerInputs(**{name: tensors[suffix] for name, suffix in _STORED_AS.items() if suffix in stored})


def signed_from_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0 .. 255 -> int8 -128 .. 127; flipping the top bit subtracts 128."""
    return (codes ^ 0x80).view(torch.int8)


def codes_from_signed(weight: Tensor) -> Tensor:
    """int8 -128 .. 127 -> uint8 codes 0 .. 255."""
    return weight.view(torch.uint8) ^ 0x80
