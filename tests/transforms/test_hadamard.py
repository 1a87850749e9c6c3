"""Rotations leave the function, on every architecture, and are where they were announced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from folded import Folded
from opened import Opened, sample_ids
from pydantic import ValidationError
from situations import situation
from tiny_models import TINY

from quantkit.eval.injectors import add_outliers
from quantkit.formats.layer import LayerFormat
from quantkit.kernels.online import apply
from quantkit.kernels.reference import fake_quantize
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.block import Block
from quantkit.models.stream import BlockStream
from quantkit.recipe import Scheme, WeightScheme
from quantkit.transforms import hadamard
from quantkit.transforms.apply import Transformed
from quantkit.transforms.hadamard import Config, online, solve

ANY = LayerFormat(weights=WeightScheme(bits=4, group_size=-1, symmetric=True))
ALL = Config()


def block_of(model: Opened, index: int = 0) -> Block:
    return model.skeleton.read_block(index, model.checkpoint)


@pytest.mark.parametrize("config", [ALL, Config(sites=("attention.output", "attention.value"))], ids=["all", "o"])
@pytest.mark.parametrize("name", TINY)
def test_the_function_stays(tiny, name, config):
    """Float64, so that only the algebra is tested: dropping any one inverse, or a sign, shows."""
    model = Folded(tiny(name))
    stream = BlockStream(model.skeleton, model.checkpoint, torch.float64)
    captured = stream.capture(sample_ids(padded=False)[0])
    for index in range(model.skeleton.num_blocks):
        block, linears = model.block(index), [info.name for info in model.skeleton.linears(index)]
        for site in block.sites:
            if site.kind == "norm" and model.in_float32:  # what multiplies in float32 is exact for powers of two alone
                weight = block.tensors[f"{site.producer}.weight"]
                gain = (weight + site.norm_offset).abs().clamp(min=0.1).log2().round().exp2()
                weight.copy_(gain - site.norm_offset)
        module = model.skeleton.build_block(index, block.tensors, torch.float64)
        before = stream.run_block(module, captured.hidden, index, captured)
        sources = {path: block.weight(path).clone() for path in linears}
        state = Transformed(block, linears, torch.float64, pytest.fail)
        state.apply("hadamard", solve(situation(block, linears), config))
        module = model.skeleton.build_block(index, block.tensors, torch.float64)
        simulate_inputs(module, dict.fromkeys(state.inputs, ANY), state.inputs, model.skeleton.expert_names)
        after = stream.run_block(module, captured.hidden, index, captured)
        assert float((after - before).norm() / before.norm()) < 1e-10
        for path in state.inputs:
            assert not torch.allclose(block.weight(path), sources[path], atol=1e-3), path


@pytest.mark.parametrize("name", TINY)
def test_solves_what_it_announces(tiny, name):
    model = Opened(tiny(name))
    for sites in ("all", ("attention.output",), ("mlp.hidden", "other"), ("attention.value",)):
        config = Config(sites=sites)
        block = block_of(model, 1)
        linears = model.linears(1)[1:]
        solution = solve(situation(block, linears), config)
        announced = online(block.sites, linears, config)
        assert set(announced) == set(solution.ops) <= set(linears)
        assert set(announced.values()) <= {frozenset({"hadamard"})}
        assert all(inputs.op == "hadamard" for inputs in solution.ops.values())


def test_every_linear_is_rotated_somehow(tiny):
    for name in TINY:
        model = Opened(tiny(name))
        block, linears = block_of(model, 1), model.linears(1)
        solution = solve(situation(block, linears), ALL)
        folded = {path for site in block.sites if site.name in solution.matrices for path in site.consumers}
        assert folded | set(solution.ops) == set(linears), name
        assert not folded & set(solution.ops), name
        whole = solve(situation(block, linears), Config(sites=("attention.output",)))
        assert set(whole.ops) == folded, name


def test_readers_of_one_tensor_have_one_rotation_and_inputs_have_their_own(tiny):
    model = Opened(tiny("qwen2_moe"))
    block, linears = block_of(model, 1), model.linears(1)
    ops = solve(situation(block, linears), ALL).ops

    def same(one: str, other: str) -> bool:
        return torch.equal(ops[one].signs, ops[other].signs)

    assert same("self_attn.q_proj", "self_attn.v_proj")
    assert same("mlp.experts.0.gate_proj", "mlp.experts.3.up_proj")
    assert same("mlp.experts.0.gate_proj", "mlp.shared_expert.up_proj")
    assert same("mlp.experts.0.down_proj", "mlp.experts.5.down_proj")
    assert not same("self_attn.q_proj", "mlp.experts.0.up_proj")  # of one width
    assert 0.2 < float((ops["self_attn.q_proj"].signs > 0).float().mean()) < 0.8


def test_signs_follow_from_the_seed_and_the_block(tiny):
    model = Opened(tiny("llama"))
    linears = model.linears(0)

    def signs(index: int, **changes: Any) -> torch.Tensor:
        return solve(situation(block_of(model, index), linears, **changes), ALL).ops["mlp.down_proj"].signs

    assert torch.equal(signs(0), signs(0))
    assert not torch.equal(signs(0), signs(0, seed=1))
    assert not torch.equal(signs(0), signs(1))


def test_a_model_without_a_table_is_rotated_linear_by_linear(tiny):
    model = Opened(tiny("llama"))
    block = replace(block_of(model), sites=())
    solution = solve(situation(block, model.linears(0)), ALL)
    assert set(solution.ops) == set(model.linears(0))
    assert not solution.matrices
    # They may read one tensor, which is then rotated once.
    assert torch.equal(solution.ops["self_attn.q_proj"].signs, solution.ops["self_attn.k_proj"].signs)


def test_values_are_left_where_v_or_o_is_not_quantised(tiny):
    model = Opened(tiny("llama"))
    block = block_of(model)
    for missing in ("self_attn.v_proj", "self_attn.o_proj"):
        solution = solve(situation(block, set(model.linears(0)) - {missing}), ALL)
        assert not solution.matrices
        assert missing not in solution.ops


def test_an_outlier_is_spread(tiny):
    """One channel is a hundred times the others: four bits lose everything else, and hardly anything behind R."""
    scheme = Scheme.parse("W4A4").activations
    assert scheme is not None
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 104, generator=generator), torch.randn(32, 104, generator=generator)
    x[:, 5] *= 100
    model = Opened(tiny("llama"))
    inputs = solve(situation(block_of(model), ["mlp.down_proj"]), ALL).ops["mlp.down_proj"]
    rotated = apply(x, inputs)
    assert float(rotated.abs().max()) < 0.25 * float(x.abs().max())
    want = x @ weight.T
    plain = (fake_quantize(x, scheme) @ weight.T - want).norm()
    assert (fake_quantize(rotated, scheme) @ apply(weight, inputs).T - want).norm() < 0.5 * plain


def test_norms_in_front_of_a_rotation_are_plain(tiny):
    """Large channels and offsets of a norm's output do not reach the rotation: readers have them."""
    model = Opened(tiny("opt"))
    block, linears = block_of(model), model.linears(0)
    add_outliers(block, torch.Generator().manual_seed(0))
    norm = block.tensors["self_attn_layer_norm.weight"].clone()
    norm[3] = 0  # has no scale
    block.tensors["self_attn_layer_norm.weight"] = norm
    bias = block.tensors["self_attn_layer_norm.bias"].clone()
    assert float(norm.abs().max()) > 20
    state = Transformed(block, linears, torch.float64, pytest.fail)
    state.apply("hadamard", solve(situation(block, linears), Config().settled(fused=False, first=True)))
    plain = block.tensors["self_attn_layer_norm.weight"].abs()
    torch.testing.assert_close(plain, (torch.arange(len(plain)) != 3).to(plain))
    assert float(bias.abs().max()) > 20
    assert float(block.tensors["self_attn_layer_norm.bias"].abs().max()) < 1e-6

    kept = solve(situation(block, linears), Config().settled(fused=False, first=False))  # behind smoothquant, perhaps
    assert not kept.sites
    assert kept.ops


def test_facts_say_each_kind_of_input_once(tiny):
    model = Opened(tiny("qwen3_moe"))
    facts = solve(situation(block_of(model, 1), model.linears(1)), ALL).facts
    assert [fact["site"] for fact in facts] == [
        "attention.input", "mlp.input", "mlp.experts.*.hidden", "attention.value",
    ]  # fmt: skip
    assert {fact["matrix"] for fact in facts} == {"hadamard"}


def test_options():
    for sites in ((), ("attention",), "some"):
        with pytest.raises(ValidationError):
            Config(sites=sites)
    assert hadamard.Config.model_validate({"sites": ["mlp.hidden"]}).sites == ("mlp.hidden",)
