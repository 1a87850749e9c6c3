import pytest
import torch
from handmade import layer_format, layer_inputs, round_to_nearest
from pydantic import ValidationError
from torch import Tensor

from quantkit.formats.layer import LayerFormat, LayerInputs, from_tensors, stored_bytes, tensor_specs, to_tensors
from quantkit.recipe import ActivationScheme, WeightScheme

FORMATS = [
    ("W4A16G64", {}), ("W2SA16G32", {}), ("W8A16", {}), ("W3ZA16G64", {}), ("W5ZA16G24", {}), ("W6SA16GC", {}),
    ("W7ZA16G64", {}), ("WNF4A16G64", {}), ("W8A8", {}), ("W8A8G64", {}), ("W4A8", {}), ("W8ZA8", {}),
    ("W4ZA16G128", {"input_scale": True}), ("W8A8", {"input_scale": True}), ("W4A16G64", {"input_shift": True}),
    ("W8A8TS", {}), ("W6A6ZTS", {}), ("W4A4ZTS", {"input_scale": True, "input_shift": True}), ("W4A4B32", {}),
    ("W4A4", {"input_op": "hadamard"}), ("W4A4", {"input_op": "dense", "input_scale": True}),
    ("W4A4TS", {"input_op": "kronecker", "input_left": 8, "input_shift": True}),
    ("W4A4Z", {"input_clip": True}), ("W8A8", {"input_clip": True, "input_op": "hadamard"}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("scheme", "settings"), FORMATS, ids=str)
def test_round_trip_and_exact_size(scheme, settings, dtype):
    layer = layer_format(scheme, **settings)
    weight = round_to_nearest(torch.randn(53, 200), layer, dtype)  # 200 = 3 groups of 64 and a short one
    inputs = layer_inputs(layer, 200)
    tensors = to_tensors(weight, layer, inputs)

    specs = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}
    assert specs == tensor_specs(layer, 53, 200, dtype)
    assert stored_bytes(layer, 53, 200, dtype) == sum(tensor.nbytes for tensor in tensors.values())

    back, back_inputs = from_tensors(tensors, layer)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    assert (back.zero_point is None) == (weight.zero_point is None)
    assert back.zero_point is None or torch.equal(back.zero_point, weight.zero_point)
    assert torch.equal(back.dequantize(), weight.dequantize())
    rounded = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in held(inputs).items()
    }
    assert same_inputs(back_inputs, LayerInputs(**rounded))


def held(inputs: LayerInputs) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vars(inputs).items() if tensor is not None}


def same_inputs(one: LayerInputs, other: LayerInputs) -> bool:
    left, right = held(one), held(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_done_to_inputs_is_stored_as_compressed_tensors_names_it():
    layer = layer_format("W8A8ZTS", input_scale=True, input_shift=True)
    tensors = to_tensors(round_to_nearest(torch.randn(8, 24), layer, torch.bfloat16), layer, layer_inputs(layer, 24))
    specs = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}
    assert specs == {
        "weight": ((8, 24), torch.int8),
        "weight_scale": ((8, 1), torch.bfloat16),
        "input_scale_vector": ((24,), torch.bfloat16),
        "input_shift_vector": ((24,), torch.bfloat16),
        "input_scale": ((1,), torch.bfloat16),
        "input_zero_point": ((1,), torch.int8),
    }


def test_matrices_are_stored_in_the_model_dtype_and_signs_in_bytes():
    sizes = {}
    for settings in ({}, {"input_op": "hadamard"}, {"input_op": "kronecker", "input_left": 8}, {"input_op": "dense"}):
        layer = layer_format("W4A4", **settings)
        sizes[layer.input_op] = stored_bytes(layer, 64, 192, torch.bfloat16)
    assert {op: size - sizes["none"] for op, size in sizes.items()} == {
        "none": 0, "hadamard": 192, "kronecker": 2 * (8 * 8 + 24 * 24), "dense": 2 * 192 * 192,
    }  # fmt: skip


def test_only_kronecker_has_a_left_factor():
    for settings in ({"input_op": "kronecker"}, {"input_left": 8}, {"input_op": "hadamard", "input_left": 8}):
        with pytest.raises(ValidationError, match="kronecker alone needs it"):
            layer_format("W4A4", **settings)


def test_only_ranges_at_hand_are_clipped():
    for scheme in ("W4A16G64", "W8A8TS"):
        with pytest.raises(ValidationError, match="input_clip needs dynamic activations"):
            layer_format(scheme, input_clip=True)
    with pytest.raises(ValueError, match="input_clip is missing"):
        to_tensors(round_to_nearest(torch.randn(8, 64), layer_format("W4A4"), torch.float32),
                   layer_format("W4A4", input_clip=True))  # fmt: skip


def test_a_format_follows_what_is_done_to_the_input():
    clipped = layer_format("W4A4", input_clip=True)
    assert layer_format("W4A4").with_inputs(layer_inputs(clipped, 24)) == clipped
    layer = layer_format("W4A4", input_scale=True, input_op="kronecker", input_left=8)
    assert layer_format("W4A4").with_inputs(layer_inputs(layer, 24)) == layer
    plain = layer_format("W4A4", input_op="hadamard", input_shift=True)
    assert layer.with_inputs(layer_inputs(plain, 24)) == plain
    assert layer.with_inputs(LayerInputs()) == layer_format("W4A4")


def test_bits_per_weight_is_the_formula():
    layer = layer_format("W4ZA16G64")  # codes + (scale + zero point) per group
    stored = stored_bytes(layer, 4096, 4096, torch.bfloat16) - 16  # weight_shape
    assert stored * 8 / 4096**2 == 4 + (16 + 4) / 64


@pytest.mark.parametrize(
    ("scheme", "storage"),
    [
        ("W8A8", "int8"),
        ("W8A8G64", "int8"),
        ("W8A16", "packed"),
        ("W4A8", "packed"),
        ("W8ZA8", "packed"),
        ("W8A4", "packed"),
        ("W8A8TS", "int8"),
    ],
)
def test_storage_follows_from_the_scheme(scheme, storage):
    layer = layer_format(scheme)
    assert layer.storage == storage
    assert LayerFormat.model_validate(layer.model_dump(mode="json")) == layer
    left_out = {key: value for key, value in layer.model_dump().items() if key != "storage"}
    assert LayerFormat.model_validate(left_out) == layer


def test_symmetric_is_decided():
    assert LayerFormat(weights=WeightScheme(bits=4)).weights.symmetric is True
    assert LayerFormat(weights=WeightScheme(bits=3)).weights.symmetric is False


def test_int8_storage_takes_eight_symmetric_bits():
    with pytest.raises(ValidationError, match="use storage: packed"):
        LayerFormat(weights=WeightScheme(bits=4), storage="int8")
    with pytest.raises(ValidationError, match="use storage: packed"):
        LayerFormat(weights=WeightScheme(bits=8, symmetric=False), activations=ActivationScheme(), storage="int8")


def test_int8_weights_are_signed_codes():
    layer = layer_format("W8A8")
    weight = round_to_nearest(torch.tensor([[-1.0, 0.0, 0.5, 1.0]]), layer, torch.float32)
    tensors = to_tensors(weight, layer)
    assert tensors.keys() == {"weight", "weight_scale"}
    assert torch.equal(tensors["weight"].int(), weight.codes.int() - 128)


def test_arguments_that_contradict_each_other_are_a_bug():
    weight = round_to_nearest(torch.randn(8, 64), layer_format("W4A16G32"), torch.float32)
    with pytest.raises(ValueError, match="quantised differently"):
        to_tensors(weight, layer_format("W4A16G64"))
    with pytest.raises(ValueError, match="input_scale_vector is missing"):
        to_tensors(weight, layer_format("W4A16G32", input_scale=True))
    with pytest.raises(ValueError, match="input_shift_vector is not part of the format"):
        to_tensors(weight, layer_format("W4A16G32"), LayerInputs(shift=torch.ones(64)))
    with pytest.raises(ValueError, match="input_scale is missing"):
        to_tensors(weight, layer_format("W4A8TSG32"))
    with pytest.raises(ValueError, match="input_zero_point is missing"):
        to_tensors(weight, layer_format("W4A8ZTSG32"), LayerInputs(static_scale=torch.ones(1)))


def test_says_what_it_is():
    assert layer_format("W4A16G32").describe() == "W4SA16G32"
    assert layer_format("W8A8ZTS", input_scale=True, input_shift=True).describe() == "W8SA8ZTSGC x t + s"
    assert layer_format("W4A4", input_scale=True, input_op="hadamard").describe() == "W4SA4GC x t hadamard"
    assert layer_format("W4A4", input_clip=True).describe() == "W4SA4GC clip"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["W2SA16G32", "W4A16G64", "W4ZA16G64", "W8A16", "W8ZA16G32", "W3ZA16G64", "W8A8"])
def test_compressed_tensors_gets_the_same_weights(scheme, dtype):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from quantkit.formats.portable import portable_config

    layer = layer_format(scheme)
    weight = round_to_nearest(torch.randn(48, 192), layer, dtype)
    group = portable_config({"x": layer}, [])["config_groups"]["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    theirs = compressor.decompress(to_tensors(weight, layer), quantization.QuantizationScheme(**group))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, weight.dequantize(dtype))
