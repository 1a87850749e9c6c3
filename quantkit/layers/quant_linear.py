"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.formats.layer import LayerFormat, LayerInputs, inputs_from_tensors, tensor_specs
from quantkit.kernels import dispatch, input_codes, reference
from quantkit.kernels.triton import inputs as gpu_inputs
from quantkit.recipe import ActivationScheme

if TYPE_CHECKING:
    from quantkit.layers.sharing import SharedInput


class QuantLinear(nn.Module):
    """Holds the tensors of ``formats/layer.py`` as buffers under the names and dtypes they have in a checkpoint.

    What ``state_dict`` returns is what was loaded, byte for byte. While the model runs, the codes may be held in the
    layout of a kernel instead (``kernels/dispatch.py``): the buffer ``weight_name`` is then None, and comes back for
    ``state_dict``, ``load_state_dict``, ``.to`` and the like, copies and ``unpack``.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is a bias [out_features].
        layer: how the weight is stored and run.
        dtype: dtype of scales and bias, which is also that of inputs and outputs.
        device: where the (uninitialised) buffers are made; ``meta`` before loading a checkpoint.
    """

    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layer: LayerFormat,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.format = layer
        self.shared_input: SharedInput | None = None
        """In common with linears that read the same tensor and do the same to it (``sharing.py``)."""
        self.runtime: dispatch.Runtime | None = None
        """What the layer runs with; None: not chosen yet."""
        for suffix, (shape, stored) in tensor_specs(layer, out_features, in_features, dtype).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=stored, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.linear(x, self)

    def changed_input(self, x: Tensor, kernels: bool = False) -> Tensor:
        """What of ``x`` [..., in_features] meets the weight; ``kernels``: from GPU kernels, without gradient."""

        def make() -> Tensor:
            change = gpu_inputs.values if kernels else reference.transform_input
            return change(x, self.inputs, self.format.activations)

        return make() if self.shared_input is None else self.shared_input.of(x, make)

    def input_codes(self, x: Tensor) -> input_codes.InputCodes:
        """``changed_input`` before integers become values again; only with activations per token or per tensor."""

        def make() -> input_codes.InputCodes:
            assert self.format.activations is not None
            if x.is_cuda:
                return gpu_inputs.codes(x, self.format.activations, self.inputs)
            changed = reference.transform_input(x, self.inputs, None)
            return input_codes.quantize(changed, self.format.activations, self.inputs)

        return make() if self.shared_input is None else self.shared_input.of(x, make, "codes")

    @property
    def weight_name(self) -> str:
        """The buffer that holds the codes."""
        return "weight" if self.format.storage == "int8" else "weight_packed"

    def stored_weight(self) -> Tensor:
        """The codes as they are stored, made again where a run-time layout took their place."""
        held = self._buffers[self.weight_name]
        if held is not None:
            return held
        runtime = self.runtime
        assert runtime is not None
        assert runtime.layout is not None
        assert runtime.layout.restore is not None
        with torch.inference_mode(False), torch.no_grad():
            return runtime.layout.restore(runtime.packed, self).to(self.weight_scale.device)

    def unpack(self) -> None:
        """Hold the codes as they are stored; the run-time layout is dropped, and made again when it is needed."""
        self._buffers[self.weight_name] = self.stored_weight()
        self.runtime = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self.unpack()  # what moves or changes its dtype is what is stored
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        held = self._buffers[self.weight_name]
        self._buffers[self.weight_name] = self.stored_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._buffers[self.weight_name] = held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy`` and ``pickle``: without the run-time layout."""
        buffers = self._buffers | {self.weight_name: self.stored_weight()}
        return self.__dict__ | {"_buffers": buffers, "runtime": None}

    @property
    def inputs(self) -> LayerInputs:
        """What is done to the input first, as it is stored."""
        return inputs_from_tensors(self._buffers, self.format)

    def dequantize(self) -> Tensor:
        """The weight [out_features, in_features] in the dtype of the scales, as it meets the changed input."""
        dense = torch.empty(
            self.out_features, self.in_features, dtype=self.weight_scale.dtype, device=self.weight_scale.device
        )
        for first, last, block in reference.row_blocks(self):
            dense[first:last] = block
        return dense

    def extra_repr(self) -> str:
        weights = self.format.weights
        kind = weights.levels if weights.levels != "uniform" else f"{weights.bits} bits"
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"
        text += f", group_size={weights.group_size}, symmetric={weights.symmetric}"
        if self.format.activations:
            text += f", activations={_describe(self.format.activations)}"
        text += ", input_scale" * self.format.input_scale + ", input_shift" * self.format.input_shift
        text += "" if self.format.input_op == "none" else f", input_op={self.format.input_op}"
        return text + ", input_clip" * self.format.input_clip


def _describe(activations: ActivationScheme) -> str:
    shared = f"group of {activations.group_size}" if activations.granularity == "group" else activations.granularity
    kind = ("" if activations.dynamic else "static ") + ("" if activations.symmetric else "asymmetric ")
    return f"{kind}{activations.bits} bits per {shared}"
