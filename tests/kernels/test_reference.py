import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from handmade import layer_format, layer_inputs, round_to_nearest
from torch import Tensor

from quantkit.formats.layer import to_tensors
from quantkit.formats.quantized import QuantizedWeight
from quantkit.kernels import reference
from quantkit.layers.quant_linear import QuantLinear
from quantkit.recipe import ActivationScheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
SCHEMES = ["W4A16G64", "W4ZA16G64", "W2SA16G32", "W3ZA16G48", "W5SA16GC", "W7ZA16GC", "W8A16G64", "WNF4A16G64", "W8A8"]
SCHEMES += ["W8A8TS", "W4A6ZTSG64", "W8A8ZT", "W4A4B48"]
OUT, IN = 37, 200  # 200 columns: a short last group for 64, 48 and 32


def make(scheme: str, dtype: torch.dtype, bias: bool = True, **settings: Any) -> tuple[QuantLinear, QuantizedWeight]:
    layer = layer_format(scheme, **settings)
    generator = torch.Generator().manual_seed(5)
    weight = round_to_nearest(torch.randn(OUT, IN, generator=generator), layer, dtype)
    tensors = to_tensors(weight, layer, layer_inputs(layer, IN))
    if bias:
        tensors["bias"] = torch.randn(OUT, generator=generator).to(dtype)
    linear = QuantLinear(IN, OUT, bias, layer, dtype)
    linear.load_state_dict(tensors)
    return linear, weight


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that grow, so that a scale taken over the wrong dimension shows."""
    rows = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1))
    return (rows * torch.arange(1, shape[-1] + 1)[:, None] if shape else rows).to(dtype)


@DTYPES
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_dense_layer(scheme, dtype, monkeypatch):
    linear, weight = make(scheme, dtype)
    x = inputs(2, 5, dtype=dtype)
    dense = weight.dequantize(dtype)
    assert torch.equal(linear.dequantize(), dense)
    stored = linear.inputs
    seen = x
    if linear.format.activations:
        seen = reference.fake_quantize(x, linear.format.activations, stored.static_scale, stored.static_zero_point)
    want = F.linear(seen, dense, linear.bias)
    torch.testing.assert_close(linear(x), want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 5 * IN * dtype.itemsize)  # 37 rows in blocks of 5
    torch.testing.assert_close(linear(x), want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert torch.equal(linear.dequantize(), dense)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("scheme", ["W4ZA16G64", "W8A8"])
def test_any_leading_dimensions(scheme, shape):
    linear, _ = make(scheme, torch.float32)
    x = inputs(*shape)
    y = linear(x)
    assert y.shape == (*shape, OUT)
    flat = torch.stack([linear(row) for row in x.reshape(-1, IN)]) if x.numel() else y.reshape(-1, OUT)
    torch.testing.assert_close(y.reshape(-1, OUT), flat, rtol=1e-5, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8ZTS", "W4A4B32", "W4A16G64"])
def test_scale_then_shift_then_rounding(scheme, dtype):
    plain, _ = make(scheme, dtype)
    scaled, _ = make(scheme, dtype, input_scale=True)
    both, _ = make(scheme, dtype, input_scale=True, input_shift=True)
    shifted, _ = make(scheme, dtype, input_shift=True)
    x = inputs(4, dtype=dtype)
    t, s = both.inputs.scale, both.inputs.shift
    assert torch.equal(scaled(x), plain(x * t))
    assert torch.equal(shifted(x), plain(x + s))
    assert torch.equal(both(x), plain(x * t + s))
    assert not torch.allclose(both(x), plain((x + s) * t))
    assert not torch.allclose(scaled(x), plain(x))


def test_gradient_of_the_input():
    linear, weight = make("W3ZA16G48", torch.float32)
    x = inputs(2, 3).requires_grad_()
    dense_x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    upstream = torch.randn(2, 3, OUT)
    (linear(x) * upstream).sum().backward()
    (F.linear(dense_x, weight.dequantize(), linear.bias) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, dense_x.grad)


def test_gradients_pass_straight_through_a_rounding():
    """On a static grid: as through a clamp to what the grid holds."""
    scheme = ActivationScheme(bits=4, granularity="tensor", dynamic=False, symmetric=False)
    x = inputs(5).requires_grad_()
    reference.fake_quantize(x, scheme, torch.tensor([0.5]), torch.tensor([-2], dtype=torch.int8)).sum().backward()
    held = (x > -3.5) & (x < 5)  # codes -8 .. 7 are -3 .. 4.5, and a step around that
    assert 0 < int(held.sum()) < held.numel()
    torch.testing.assert_close(x.grad, held.float())


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4Z", "W6A6T", "W4A4ZB48", "W8A8TS", "W6A6ZTS"])
def test_the_gradient_goes_straight_through_rounding(scheme):
    layer = layer_format(scheme, input_scale=True, input_shift=True)
    assert layer.activations is not None
    stored = layer_inputs(layer, IN)
    grid = layer.activations, stored.static_scale, stored.static_zero_point
    x = inputs(2, 3).requires_grad_()
    upstream = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(0))
    rounded = reference.fake_quantize(x, *grid)
    (rounded * upstream).sum().backward()
    assert torch.equal(rounded, reference.fake_quantize(x.detach(), *grid))  # nothing else is different
    inside = torch.ones_like(x, dtype=torch.bool)
    if stored.static_scale is not None:  # about -4 .. 4, x goes to 9 and more
        ends = [reference.fake_quantize(torch.tensor([end]), *grid) for end in (-1e4, 1e4)]
        inside = (x >= ends[0] - stored.static_scale) & (x <= ends[1] + stored.static_scale)
        assert 0 < (~inside).sum() < inside.sum()
    assert torch.equal(x.grad, upstream * inside)
    x.grad = None
    (reference.transform_input(x, stored, layer.activations) * upstream).sum().backward()
    if stored.static_scale is None:
        torch.testing.assert_close(x.grad, upstream * stored.scale)


# --- clipped ranges --------------------------------------------------------------------------------------------------

CLIPPED = ["W8A8", "W4A4", "W4A4Z", "W6A6T", "W4A4ZT", "W4A4B48", "W4A4ZB48"]


def grid(scheme: str) -> ActivationScheme:
    activations = layer_format(scheme).activations
    assert activations is not None
    return activations


@DTYPES
@pytest.mark.parametrize("scheme", CLIPPED)
def test_a_whole_range_is_no_clip_bit_for_bit(scheme, dtype):
    x = inputs(2, 5, dtype=dtype)
    x[0, 0], x[0, 1], x[1, 0] = 0, x[0, 1].abs(), -x[1, 0].abs()
    want = reference.fake_quantize(x, grid(scheme))
    ones = torch.ones(2, dtype=dtype)
    assert torch.equal(reference.fake_quantize(x, grid(scheme), clip=ones), want)
    with_gradients = reference.fake_quantize(x.requires_grad_(), grid(scheme), clip=ones.requires_grad_())
    assert torch.equal(with_gradients.detach(), want)


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
def test_a_clipped_token_is_rounded_to_the_grid_of_its_shares(symmetric, dtype):
    """As if its largest values were that much smaller; what lies beyond becomes the ends of the grid."""
    scheme = ActivationScheme(bits=4, symmetric=symmetric)
    x, clip = inputs(6, dtype=dtype), torch.tensor([0.5, 0.75], dtype=dtype)
    low, high = x.amin(-1, keepdim=True) * clip[0], x.amax(-1, keepdim=True) * clip[1]
    step = (torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15).to(dtype)
    zero = 0 if symmetric else (-8 - low / step).clamp(-8, 7).round()
    want = ((x / step + zero).clamp(-8, 7).round() - zero) * step
    found = reference.fake_quantize(x, scheme, clip=clip)
    assert torch.equal(found, want)
    assert (found.amax(-1) < 0.85 * x.amax(-1)).all()
    assert not torch.equal(found, reference.fake_quantize(x, scheme, clip=clip.flip(0)))


@pytest.mark.parametrize("scheme", CLIPPED)
def test_every_range_is_clipped_by_itself(scheme):
    x, clip = inputs(4), torch.tensor([0.6, 0.8])
    found = reference.fake_quantize(x, grid(scheme), clip=clip)
    if grid(scheme).granularity == "token":
        assert torch.equal(found[2], reference.fake_quantize(x[2], grid(scheme), clip=clip))
    if grid(scheme).granularity == "group":
        alone = ActivationScheme(bits=4, symmetric=grid(scheme).symmetric)
        parts = [reference.fake_quantize(part, alone, clip=clip) for part in x.split(48, dim=-1)]
        assert torch.equal(found, torch.cat(parts, dim=-1))
    assert torch.equal(reference.fake_quantize(0 * x, grid(scheme), clip=clip), 0 * x)
    torch.testing.assert_close(reference.fake_quantize(4 * x, grid(scheme), clip=clip), 4 * found)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
def test_the_slope_of_what_is_cut_off_is_the_true_one(symmetric):
    """Tokens of values of one size on either side: all of them are beyond the grid and move with its ends."""
    scheme = ActivationScheme(bits=8, symmetric=symmetric)  # the grid ends within half a step of the range
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.randn(5, IN, generator=generator) < 0, -2.0, 3.0)
    upstream = torch.randn(5, IN, generator=generator)
    # Zero points move in steps, so slopes are compared along a path: the fundamental theorem.
    path = torch.stack((torch.linspace(0.3, 0.5, 401), torch.linspace(0.35, 0.5, 401)), dim=1)
    values, slopes = [], []
    for clip in path:
        clip = clip.clone().requires_grad_()
        value = (reference.fake_quantize(x, scheme, clip=clip) * upstream).sum()
        (slope,) = torch.autograd.grad(value, clip)
        values.append(value.detach())
        slopes.append(slope)
    along = torch.stack(slopes)
    found = ((along[1:] + along[:-1]) / 2 * path.diff(dim=0)).sum()
    assert float((values[-1] - values[0]).abs()) > 1
    torch.testing.assert_close(found, values[-1] - values[0], rtol=0.03 if not symmetric else 1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
def test_gradients_of_clipped_ranges(symmetric):
    """Inside the grid straight through, beyond it none but of the ends, which go to the largest and least value."""
    scheme = ActivationScheme(bits=4, symmetric=symmetric)
    x, clip = inputs(5).requires_grad_(), torch.tensor([0.5, 0.5], requires_grad=True)
    upstream = torch.randn(5, IN, generator=torch.Generator().manual_seed(0))
    rounded = reference.fake_quantize(x, scheme, clip=clip)
    (rounded * upstream).sum().backward()
    with torch.no_grad():
        low, high = 0.5 * x.amin(-1, keepdim=True), 0.5 * x.amax(-1, keepdim=True)
        step = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
        zero = 0 if symmetric else (-8 - low / step).round()
        inside = ((x / step + zero) >= -8) & ((x / step + zero) <= 7)
        ends = torch.zeros_like(inside)
        ends.scatter_(1, x.argmax(-1, keepdim=True), True).scatter_(1, x.argmin(-1, keepdim=True), True)
        slope = torch.where(inside, rounded / step - x / step, rounded / step)  # of each value to the step
    assert 0.02 < float((~inside).float().mean()) < 0.5
    torch.testing.assert_close(x.grad[~ends], (upstream * inside)[~ends])
    assert (x.grad[ends] != 0).any()
    if symmetric:  # to the end that is farther away
        upper = high >= -low
        of_step = (upstream * slope).sum(-1, keepdim=True) / 7.5
        own = torch.stack((-(x.amin(-1, keepdim=True) * ~upper), x.amax(-1, keepdim=True) * upper))
        torch.testing.assert_close(clip.grad, (own * of_step).sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_a_fixed_input_may_have_a_clip_that_learns():
    clip = torch.tensor([0.9, 0.9], requires_grad=True)
    x = inputs(5)
    scheme = ActivationScheme(bits=3)
    optimiser = torch.optim.Adam([clip], lr=0.02)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (reference.fake_quantize(x, scheme, clip=clip) - x).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


def test_inference_mode_leaves_the_scratch_usable():
    reference._scratch.buffers.clear()
    linear, _ = make("W4A16G64", torch.float32)
    with torch.inference_mode():
        inside = linear(inputs(3))
    assert torch.equal(linear(inputs(3)), inside)


def test_threads_do_not_share_scratch():
    layers = [make(scheme, torch.float32)[0] for scheme in ("W4A16G64", "W4ZA16G64", "W8A16G64")]
    x = inputs(3)
    want = [layer(x) for layer in layers]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(layers[number](x), want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_activations_are_rounded_as_compressed_tensors_does(granularity, bits, symmetric, dtype):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=granularity, dynamic=True)
    module = torch.nn.Linear(1, 1)
    module.quantization_status = quantization.QuantizationStatus.FROZEN
    x = inputs(3, 17, dtype=dtype)
    x[0, 0] = 0  # a token without range
    x[0, 1] = x[0, 1].abs()  # no negative value
    x[0, 2, 3] = -50  # an outlier on the side that is not clipped
    want = forward.forward_quantize(module, x, "input", args)
    scheme = ActivationScheme(bits=bits, symmetric=symmetric, granularity=granularity)
    assert torch.equal(reference.fake_quantize(x, scheme), want)


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("bits", [4, 8])
def test_static_activations_are_rounded_as_compressed_tensors_does(bits, symmetric, dtype):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="tensor", dynamic=False)
    module = torch.nn.Linear(1, 1)
    module.quantization_status = quantization.QuantizationStatus.FROZEN
    module.input_scale = torch.nn.Parameter(torch.tensor([0.37], dtype=dtype))
    if not symmetric:
        module.register_buffer("input_zero_point", torch.tensor([-3], dtype=torch.int8))
    x = inputs(3, 17, dtype=dtype)  # clipped on both sides at 4 bits
    want = forward.forward_quantize(module, x, "input", args)
    scheme = ActivationScheme(bits=bits, symmetric=symmetric, granularity="tensor", dynamic=False)
    zero_point = None if symmetric else module.input_zero_point
    assert torch.equal(reference.fake_quantize(x, scheme, module.input_scale, zero_point), want)


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
def test_groups_are_rounded_as_compressed_tensors_does(symmetric, dtype):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=40, dynamic=True)
    module = torch.nn.Linear(1, 1)
    module.quantization_status = quantization.QuantizationStatus.FROZEN
    x = inputs(3, 17, dtype=dtype)
    x[0, 0, 40:80] = 0  # a group without range
    want = forward.forward_quantize(module, x, "input", args)
    scheme = ActivationScheme(bits=4, symmetric=symmetric, granularity="group", group_size=40)
    assert torch.equal(reference.fake_quantize(x, scheme), want)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("size", [8, 48, 192, 200, 256])
def test_a_group_is_a_token_by_itself(size, symmetric):
    """Also the short last one: 48 leaves 8 channels over, 192 too, 200 nothing, 256 is wider than the input."""
    x = inputs(2, 3)
    scheme = ActivationScheme(bits=4, symmetric=symmetric, granularity="group", group_size=size)
    alone = ActivationScheme(bits=4, symmetric=symmetric)
    want = torch.cat([reference.fake_quantize(part, alone) for part in x.split(size, dim=-1)], dim=-1)
    assert torch.equal(reference.fake_quantize(x, scheme), want)
    assert torch.equal(reference.fake_quantize(x[1, 2], scheme), want[1, 2])
    assert reference.fake_quantize(x[:0], scheme).shape == (0, 3, IN)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("settings", [{}, {"granularity": "group", "group_size": 48}], ids=["token", "group"])
def test_tokens_do_not_depend_on_their_neighbours(settings, symmetric):
    x = inputs(4, 3)
    scheme = ActivationScheme(bits=8, symmetric=symmetric, **settings)
    whole = reference.fake_quantize(x, scheme)
    assert torch.equal(reference.fake_quantize(x[2:3], scheme), whole[2:3])
    assert torch.equal(reference.fake_quantize(x.reshape(12, IN), scheme), whole.reshape(12, IN))


def test_a_static_grid_does_not_depend_on_the_batch_and_a_dynamic_one_does():
    x = inputs(4, 3)
    x[3] *= 10
    dynamic = ActivationScheme(bits=8, granularity="tensor")
    assert not torch.equal(reference.fake_quantize(x[:1], dynamic), reference.fake_quantize(x, dynamic)[:1])
    static = ActivationScheme(bits=8, granularity="tensor", dynamic=False)
    scale = torch.tensor([0.01])
    whole = reference.fake_quantize(x, static, scale)
    assert torch.equal(reference.fake_quantize(x[:1], static, scale), whole[:1])
    assert float(whole.abs().max()) <= 1.28  # nothing outside of the codes
    assert len(whole.unique()) <= 256
