import pytest
import torch
from handmade import layer_format

from quantkit.formats.layer import tensor_specs
from quantkit.layers.quant_linear import QuantLinear


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", ["W4A16G64", "W3ZA16G64", "W8A8", "WNF4A16G64", "W8A8TS", "W6A6ZTS"])
def test_holds_what_a_checkpoint_holds(scheme, bias):
    layer = layer_format(scheme)
    linear = QuantLinear(100, 30, bias, layer, torch.bfloat16, device="meta")
    held = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in linear.state_dict().items()}
    want = tensor_specs(layer, 30, 100, torch.bfloat16)
    assert held == want | ({"bias": ((30,), torch.bfloat16)} if bias else {})
    assert all(tensor.is_meta for tensor in linear.state_dict().values())
    assert not list(linear.parameters())


def test_codes_survive_a_change_of_dtype():
    layer = layer_format("W4ZA8ZTSG32", input_scale=True, input_shift=True)
    linear = QuantLinear(64, 8, True, layer, torch.bfloat16).half()
    assert linear.weight_packed.dtype == linear.weight_zero_point.dtype == torch.int32
    assert linear.state_dict()["input_zero_point"].dtype == torch.int8
    for tensor in (linear.weight_scale, linear.inputs.scale, linear.inputs.shift, linear.inputs.static_scale):
        assert tensor is not None
        assert tensor.dtype == torch.float16
    assert linear.bias is not None
    assert linear.bias.dtype == torch.float16


def test_says_what_it_is():
    text = repr(QuantLinear(64, 8, False, layer_format("W4A8", input_scale=True), torch.float32))
    assert text.startswith("QuantLinear(64, 8, bias=False, 4 bits, group_size=-1, symmetric=True, ")
    assert text.endswith("activations=8 bits per token, input_scale)")
    clipped = layer_format("W4A8", input_clip=True)
    assert repr(QuantLinear(64, 8, False, clipped, torch.float32)).endswith("8 bits per token, input_clip)")
    rotated = layer_format("W4A8", input_shift=True, input_op="hadamard")
    assert repr(QuantLinear(64, 8, False, rotated, torch.float32)).endswith(", input_shift, input_op=hadamard)")
    static = layer_format("W4A6ZTS", input_shift=True)
    assert "activations=static asymmetric 6 bits per tensor, input_shift)" in repr(
        QuantLinear(64, 8, False, static, torch.float32)
    )
    groups = QuantLinear(64, 8, False, layer_format("W4A4B32"), torch.float32)
    assert "activations=4 bits per group of 32)" in repr(groups)
    assert "nf4" in repr(QuantLinear(64, 8, False, layer_format("WNF4A16G64"), torch.float32))
