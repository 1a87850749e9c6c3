"""What is done to the input of a linear on GPUs: by kernels where they take it, else as the reference does it.

    values    reference.transform_input
    codes     input_codes.quantize of the same before it is rounded

For layers that ``integer.refuses`` and ``weight_only.refuses`` take: device and dtype are not looked at again.
"""

from __future__ import annotations

from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import reference
from quantkit.kernels.input_codes import InputCodes
from quantkit.kernels.triton import activation, transforms
from quantkit.recipe import ActivationScheme


def values(x: Tensor, inputs: LayerInputs, activations: ActivationScheme | None) -> Tensor:
    """What of ``x`` [..., columns] meets the weight, in its dtype."""
    if transforms.unsuited(inputs, x.dtype, x.shape[-1]) is not None:
        return reference.transform_input(x, inputs, activations)
    return reference.transform_input(transforms.apply(x, inputs), _range_of(inputs), activations)


def codes(x: Tensor, scheme: ActivationScheme, inputs: LayerInputs) -> InputCodes:
    """The codes of ``x`` [..., columns], per token or per tensor."""
    if inputs.op == "none":
        return activation.quantize(x, scheme, inputs)
    if transforms.unsuited(inputs, x.dtype, x.shape[-1]) is None:
        return transforms.quantize(x, scheme, inputs)
    return activation.quantize(reference.transform_input(x, inputs, None), scheme, _range_of(inputs))


def _range_of(inputs: LayerInputs) -> LayerInputs:
    """What is left to do once the input is changed: to round it."""
    return LayerInputs(static_scale=inputs.static_scale, static_zero_point=inputs.static_zero_point, clip=inputs.clip)
