import copy
from typing import Any

import pytest
from handmade import layer_format

from quantkit.errors import QuantkitError
from quantkit.formats.portable import portable_config, portable_reason, read_portable

FOUR, EIGHT = layer_format("W4A16G64"), layer_format("W8A16")


@pytest.mark.parametrize(
    "scheme", ["W2SA16G64", "W4A16G128", "W8A16", "W8A8", "W4A8", "W4A4", "W4A16GC", "W8A8TS", "W8A8ZTS"]
)
def test_what_is_portable(scheme):
    assert portable_reason({"layers.0.up": layer_format(scheme)}, {"layers.0.up": (64, 256)}) is None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layer_format("W4ZA16G64"), "zero points"),
        (layer_format("W3SA16G64"), "3-bit codes"),
        (layer_format("W5SA16G64"), "5-bit codes"),
        (layer_format("WNF4A16G64"), "nf4 levels"),
        (layer_format("W4A16G64", input_scale=True), "multiplies its input"),
        (layer_format("W4A16G96"), "256 input columns, no multiple of the group size 96"),
        (layer_format("W8A8", input_shift=True), "adds a stored vector"),
        (layer_format("W8A8", input_op="hadamard"), "multiplies its input by a matrix (hadamard), which only quantkit"),
        (layer_format("W8A8", input_clip=True), "cuts off a stored share of its input's range, which only quantkit"),
        (layer_format("W4A8TS"), "static activation scales, which vLLM runs only with 8-bit weights per channel"),
        (layer_format("W8A6TS"), "static activation scales"),
        (layer_format("W8A8TSG64"), "static activation scales"),
        (layer_format("W8A8T"), "dynamically per tensor"),
        (layer_format("W8A8Z"), "activations with a zero point"),
        (layer_format("W8A8B64"), "in groups of channels"),
    ],
)
def test_what_is_not_portable(layer, reason):
    found = portable_reason({"layers.0.up": layer}, {"layers.0.up": (64, 256)})
    assert found is not None
    assert found.startswith("layers.0.up ")
    assert reason in found


def expert_names(count: int = 3) -> list[str]:
    return [f"layers.{block}.mlp.experts.{expert}.up_proj" for block in range(2) for expert in range(count)]


def test_experts_are_portable_when_all_are_alike():
    shapes = dict.fromkeys([*expert_names(), "layers.0.q_proj"], (64, 256))
    alike = dict.fromkeys(expert_names(), FOUR)
    assert portable_reason(alike, shapes) is None
    assert portable_reason(alike | {"layers.0.q_proj": layer_format("W8A8")}, shapes) is None
    one_left_out = {name: layer for name, layer in alike.items() if ".1." not in name}
    assert "stored differently" in (portable_reason(one_left_out, shapes) or "")
    assert "stored differently" in (portable_reason(alike | {expert_names()[4]: EIGHT}, shapes) or "")
    assert "full precision" in (portable_reason({"layers.0.q_proj": FOUR}, shapes) or "")
    assert "leaves out" in (portable_reason(dict.fromkeys(expert_names(), layer_format("W4A8")), shapes) or "")


def test_the_block_of_one_scheme():
    assert portable_config({"layers.0.up": FOUR}, ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.15.0",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True,
                    "strategy": "group", "group_size": 64, "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }  # fmt: skip


def test_the_block_of_two_schemes():
    formats = {
        f"layers.{block}.{name}": layer_format("W8A8") if name == "q" else FOUR for block in (0, 1) for name in "qud"
    }
    block = portable_config(formats, ["lm_head"])
    assert block["format"] == "mixed-precision"
    groups = list(block["config_groups"].values())
    assert [(group["targets"], group["format"]) for group in groups] == [
        ([r"re:layers\.\d+\.q$"], "int-quantized"),
        (["Linear"], "pack-quantized"),
    ]
    assert groups[0]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["W8A8TS", "W8A8ZTS"])
def test_static_activations_in_the_block(scheme):
    (group,) = portable_config({"layers.0.up": layer_format(scheme)}, ["lm_head"])["config_groups"].values()
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": "Z" not in scheme, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip


def test_experts_are_named_beside_another_scheme():
    """transformers finds the experts' scheme by a 're:' target with 'experts' in it."""
    formats = dict.fromkeys(expert_names(), FOUR) | {"layers.0.q": EIGHT, "layers.1.k": EIGHT}
    targets = [group["targets"] for group in portable_config(formats, ["lm_head"])["config_groups"].values()]
    assert targets == [
        ["layers.0.q", "layers.1.k"],
        [r"re:layers\.\d+\.mlp\.experts\.\d+\.up_proj$", "Linear"],
    ]


def test_compressed_tensors_accepts_the_block():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for layer in (FOUR, EIGHT, layer_format("W8A8"), layer_format("W4A8"), layer_format("W8A8ZTS")):
        block = portable_config({"layers.0.up": layer, "layers.0.down": FOUR}, ["lm_head"])
        quantization.QuantizationConfig.model_validate(block)


OTHERS: dict[str, Any] = {  # as llm-compressor writes W4A16 with GPTQ
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.13.0",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "actorder": "static", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
}  # fmt: skip


def test_blocks_of_other_tools():
    formats = read_portable(OTHERS)
    assert formats.of("model.layers.0.mlp.up_proj") == layer_format("W4A16G128")
    assert formats.of("model.layers.0.mlp.gate") is None
    assert formats.of("lm_head") is None
    asymmetric = copy.deepcopy(OTHERS)
    asymmetric["config_groups"]["group_0"]["weights"]["symmetric"] = False
    assert read_portable(asymmetric).of("x") == layer_format("W4ZA16G128")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_status", "frozen", "quantization_status is 'frozen'"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("transform_config", {"config_groups": {"u": 1}}, "transform_config"),
        ("config_groups.group_0.format", "float-quantized", "config_groups.group_0.format is 'float-quantized'"),
        ("config_groups.group_0.format", "int-quantized", "pack-quantized unless the weights are symmetric"),
        ("config_groups.group_0.weights.type", "float", "weights.type is 'float'; quantkit reads int"),
        ("config_groups.group_0.weights.actorder", "group", "weights.actorder is 'group'"),
        ("config_groups.group_0.weights.strategy", "block", "weights.strategy is 'block'"),
        ("config_groups.group_0.weights.num_bits", 16, "weights.bits is 16"),
        ("config_groups.group_0.weights.group_size", 20, "weights.group_size is 20"),
        ("config_groups.group_0.output_activations", {"num_bits": 8}, "output_activations"),
        ("config_groups.group_0.input_activations", {"num_bits": 8, "dynamic": "local"}, "input_activations.dynamic"),
        ("config_groups.group_0.input_activations", {"strategy": "token"}, "strategy is 'token'; .* tensor:"),
        ("config_groups.group_0.input_activations", {"type": "float", "dynamic": True}, "input_activations.type"),
        ("config_groups.group_0.input_activations", {"dynamic": True, "strategy": "group"}, "activations.strategy"),
        ("config_groups.group_0", ["Linear"], "a mapping with targets and weights"),
    ],
)  # fmt: skip
def test_what_changes_the_result_is_refused(key, value, message):
    block = copy.deepcopy(OTHERS)
    *path, last = key.split(".")
    place = block
    for part in path:
        place = place[part]
    place[last] = value
    with pytest.raises(QuantkitError, match=message):
        read_portable(block)
