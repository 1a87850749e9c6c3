import json

import pytest
from handmade import layer_format

from quantkit.errors import QuantkitError
from quantkit.formats.config import native_config, portable_config, read_config

FORMATS = [
    layer_format("W4A16G64"),
    layer_format("W3ZA16G64", input_scale=True),
    layer_format("WNF4A16G64"),
    layer_format("W8A8"),
    layer_format("W4A8"),
    layer_format("W8A8TS"),
    layer_format("W8A8ZTS"),
    layer_format("W4A4ZB32", input_shift=True),
    layer_format("W6A6ZTSG64", input_scale=True, input_shift=True),
    layer_format("W4A4", input_op="hadamard"),
    layer_format("W4A4", input_op="kronecker", input_left=64, input_clip=True),
]
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.gate_proj")


def names(blocks: int) -> list[str]:
    return [f"model.layers.{block}.{linear}" for block in range(blocks) for linear in LINEARS]


@pytest.mark.parametrize("build", [native_config, portable_config])
def test_every_layer_comes_back_through_json(build):
    usable = FORMATS if build is native_config else [FORMATS[0], *FORMATS[3:7]]
    formats = {name: usable[number % 11 % len(usable)] for number, name in enumerate(names(6))}
    assert set(formats.values()) == set(usable)
    kept = ["lm_head", "model.layers.6.mlp.gate_proj", "model.layers.2.mlp.router"]
    read = read_config(json.loads(json.dumps(build(formats, kept))))
    assert {name: read.of(name) for name in formats} == formats
    assert [read.of(name) for name in kept] == [None] * 3


@pytest.mark.parametrize("build", [native_config, portable_config])
def test_the_block_does_not_grow_with_the_model(build):
    def size(blocks: int) -> int:
        formats = {name: FORMATS[0] if "mlp" in name else FORMATS[3] for name in names(blocks)}
        return len(json.dumps(build(formats, ["lm_head"])))

    assert size(80) == size(2)


def test_native_block_is_as_documented():
    block = native_config({name: FORMATS[1] for name in names(2) if name.endswith("q_proj")}, ["lm_head"])
    assert block == {
        "quant_method": "quantkit",
        "format_version": 1,
        "layers": [
            {
                "match": [r"re:model\.layers\.\d+\.self_attn\.q_proj$"],
                "weights": {"bits": 3, "symmetric": False, "group_size": 64, "levels": "uniform"},
                "activations": None,
                "input_scale": True,
                "input_shift": False,
                "input_op": "none",
                "input_left": None,
                "input_clip": False,
                "storage": "packed",
            }
        ],
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; quantkit reads 'quantkit' and 'compressed-tensors'"),
        ({"quant_method": None}, "quant_method is None"),
        ({"format_version": 2}, "format_version is 2; this quantkit reads 1"),
        ({"layers": [{"match": ["x"], "weights": {"bits": 11}}]}, "layers.0.weights.bits: .* damaged"),
        ({"layers": [{"match": ["x"], "weights": {}, "rotation": 1}]}, "layers.0.rotation: Extra"),
    ],
)
def test_what_cannot_be_read(change, message):
    block = native_config({"x": FORMATS[0]}, []) | change
    with pytest.raises(QuantkitError, match=message):
        read_config(block)
