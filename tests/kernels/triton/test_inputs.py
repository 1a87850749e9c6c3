"""Which kernel takes an input, and that all of them compute what the reference does."""

from __future__ import annotations

import pytest
import torch
from handmade import layer_format, layer_inputs

from quantkit.kernels import input_codes, reference
from quantkit.kernels.triton import activation, inputs, transforms

FORMATS = [
    ({}, "quantize"),
    ({"input_scale": True, "input_shift": True}, "quantize"),
    ({"input_op": "hadamard", "input_scale": True}, "transform"),
    ({"input_op": "kronecker", "input_left": 4, "input_clip": True}, "transform"),
    ({"input_op": "dense", "input_scale": True, "input_clip": True}, "quantize"),
]


@pytest.fixture
def ran(interpreted_inputs, monkeypatch) -> list[str]:
    """Names of what was called."""
    calls: list[str] = []
    for module, name, short in ((activation, "quantize", "quantize"), (transforms, "quantize", "transform"),
                                (transforms, "apply", "apply")):  # fmt: skip
        function = getattr(module, name)

        def call(*given, function=function, short=short):
            calls.append(short)
            return function(*given)

        monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(("settings", "kernel"), FORMATS)
def test_codes(ran, settings, kernel, dtype):
    layer = layer_format("W8A8Z", **settings)
    given = layer_inputs(layer, 64, dtype=dtype)
    x = torch.randn(3, 64).mul(torch.tensor([[1.0], [10], [0.1]])).to(dtype)
    assert layer.activations is not None
    got = inputs.codes(x, layer.activations, given)
    want = input_codes.quantize(reference.transform_input(x, given, None), layer.activations, given)
    assert int((got.codes.int() - want.codes.int()).abs().max()) <= 1
    assert float((got.codes != want.codes).float().mean()) < 0.02
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-3, atol=0)
    in_float32 = dtype == torch.float32  # which kernels of matrices do not take
    assert ran == (["quantize"] if in_float32 else [kernel])


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8"])
@pytest.mark.parametrize(("settings", "kernel"), FORMATS)
def test_values(ran, settings, kernel, scheme):
    settings = {name: on for name, on in settings.items() if scheme == "W4A8" or name != "input_clip"}
    layer = layer_format(scheme, **settings)
    given = layer_inputs(layer, 64, dtype=torch.float16)
    x = torch.randn(2, 3, 64).half()
    got, want = inputs.values(x, given, layer.activations), reference.transform_input(x, given, layer.activations)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0.06 if layer.activations else 2e-3)  # a step
    assert ran == (["apply"] if kernel == "transform" else [])
