"""What calibration sees is what the saved model computes, and readers of one input keep sharing it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import layer_format, layer_inputs, load_plain, logits, quantise, round_to_nearest
from opened import Opened, sample_ids
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit.calibrate.observe import observe
from quantkit.calibrate.streams import Streams
from quantkit.formats.layer import LayerFormat, LayerInputs, from_tensors, to_tensors
from quantkit.kernels.reference import fake_quantize
from quantkit.layers.quant_experts import ExpertNames, QuantExperts
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.simulate import simulate_inputs

SCHEMES = ["W8A8", "W4A4Z", "W6A6T", "W6A6ZT", "W8A8TS", "W6A6ZTS", "W4A4B16", "W4A6ZB64", "W4A16G64"]
ONLINE = {
    "plain": {}, "scale": {"input_scale": True}, "shift": {"input_shift": True},
    "both": {"input_scale": True, "input_shift": True}, "hadamard": {"input_op": "hadamard", "input_scale": True},
    "kronecker": {"input_op": "kronecker", "input_left": 8}, "dense": {"input_op": "dense"},
}  # fmt: skip
CLIPPED = [scheme for scheme in SCHEMES if "TS" not in scheme and "A16" not in scheme]
WIDTH = 88  # five groups of 16 and a short one


class Attention(nn.Module):
    """Three readers of one tensor and one of another."""

    def __init__(self, make: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (make(name) for name in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        x = x * 3
        return self.o(self.q(x) * self.k(x).tanh() + self.v(x))  # type: ignore[no-any-return]


def pair(layer: LayerFormat, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, dict[str, LayerInputs]]:
    """The same numbers in a dense float32 block, whose inputs are not simulated yet, and in a packed one."""
    inputs = {name: layer_inputs(layer, WIDTH, seed, dtype) for seed, name in enumerate("qkvo")}
    inputs["k"] = inputs["q"]
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: round_to_nearest(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5, layer, dtype)
        for name in "qkvo"
    }

    def dense(name: str) -> nn.Module:
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        linear.weight = nn.Parameter(weights[name].dequantize())
        return linear

    def packed(name: str) -> nn.Module:
        linear = QuantLinear(WIDTH, WIDTH, False, layer, dtype)
        linear.load_state_dict(to_tensors(weights[name], layer, inputs[name]))
        return linear

    return Attention(dense), Attention(packed), inputs


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return (x * torch.tensor([1.0, 5, 0.1, 1, 2])[:, None]).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("settings", ONLINE.values(), ids=ONLINE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_packed_block(scheme, settings):
    layer = layer_format(scheme, **settings)
    for dtype in (torch.float32, torch.bfloat16):  # what is stored; both compute in float32, as calibration does
        dense, packed, inputs = pair(layer, dtype)
        plain = dense(tokens())
        simulate_inputs(dense, dict.fromkeys("qkvo", layer), inputs, ExpertNames())
        assert torch.equal(dense(tokens()), packed.float()(tokens()))
        assert torch.equal(dense(tokens()), plain) == (scheme == "W4A16G64" and not settings)


@torch.no_grad()
@pytest.mark.parametrize("scheme", CLIPPED)
def test_clipped_inputs_equal_those_of_the_packed_block(scheme):
    layer = layer_format(scheme, input_clip=True, input_op="hadamard")
    for dtype in (torch.float32, torch.bfloat16):
        dense, packed, inputs = pair(layer, dtype)
        unclipped = {name: replace(own, clip=None) for name, own in inputs.items()}
        whole, _, _ = pair(layer, dtype)
        simulate_inputs(dense, dict.fromkeys("qkvo", layer), inputs, ExpertNames())
        simulate_inputs(whole, dict.fromkeys("qkvo", layer), unclipped, ExpertNames())
        assert torch.equal(dense(tokens()), packed.float()(tokens()))
        assert not torch.equal(dense(tokens()), whole(tokens()))


def test_readers_share_an_input_only_where_they_rotate_it_alike():
    layer = layer_format("W4A4", input_op="hadamard")
    dense, _, inputs = pair(layer, torch.float32)  # k like q, v with other signs
    simulate_inputs(dense, dict.fromkeys("qkvo", layer), inputs, ExpertNames())
    found = seen_by(dense)
    with torch.no_grad():
        dense(tokens())
    assert found["q"] is found["k"]
    assert not torch.equal(found["q"], found["v"])


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_is_close_to_the_packed_block_in_bfloat16(scheme):
    """A code may flip where bfloat16 rounds x / step to the other side, so few values are off by a step."""
    layer = layer_format(scheme, input_scale=True, input_shift=True)
    dense, packed, inputs = pair(layer, torch.bfloat16)
    plain = dense(tokens())
    simulate_inputs(dense, dict.fromkeys("qkvo", layer), inputs, ExpertNames())
    found, want = dense(tokens()), packed(tokens(torch.bfloat16)).float()
    error = (found - want).norm() / want.norm()
    assert error < (0.03 if "A8" in scheme or "A16" in scheme else 0.12)
    assert error < (plain - want).norm() / want.norm() / 3


def seen_by(block: nn.Module) -> dict[str, Tensor]:
    """Path -> what enters, as a hook that comes later sees it."""
    found: dict[str, Tensor] = {}
    for name, module in block.named_children():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = args[0]

        module.register_forward_pre_hook(hook)
    return found


@torch.no_grad()
@pytest.mark.parametrize("mode", [False, True], ids=["no_grad", "inference mode"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8ZTS", "W4A16G64"])
def test_readers_that_do_the_same_share_one_tensor(scheme, mode):
    layer = layer_format(scheme, input_scale=True)
    dense, _, inputs = pair(layer, torch.float32)
    copy = {field: None if value is None else value.clone() for field, value in vars(inputs["q"]).items()}
    inputs["k"] = LayerInputs(**copy)  # equal, not the same objects
    simulate_inputs(dense, dict.fromkeys("qkvo", layer), inputs, ExpertNames())
    found = seen_by(dense)
    with torch.inference_mode(mode):
        dense(tokens())
        first = dict(found)
        assert first["q"] is first["k"]
        assert first["v"] is not first["q"]  # another scale
        x = tokens() * 3 * inputs["q"].scale
        if layer.activations:
            x = fake_quantize(x, layer.activations, inputs["q"].static_scale, inputs["q"].static_zero_point)
        assert torch.equal(first["q"], x)
        dense(tokens() * 2)
    assert not torch.equal(found["q"], first["q"])


def test_what_was_made_of_an_input_goes_with_it():
    layer = layer_format("W8A8")
    dense, _, _ = pair(layer, torch.float32)
    simulate_inputs(dense, dict.fromkeys("qkvo", layer), {}, ExpertNames())
    found = seen_by(dense)
    with torch.no_grad():
        x = tokens()
        dense.q(x)
        kept = weakref.ref(found.pop("q"))
        assert kept() is not None
        x[0] = 0  # the same object, other values
        dense.k(x)
        assert torch.equal(found.pop("k"), fake_quantize(x, layer.activations))
        gc.collect()
        assert kept() is None
        dense.v(x)
        kept = weakref.ref(found.pop("v"))
        del x
        gc.collect()
        assert kept() is None


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8ZTS", "W4A16G64"])
def test_a_block_set_up_in_inference_mode_has_gradients(scheme):
    layer = layer_format(scheme, input_scale=True, input_shift=True)
    dense, _, _ = pair(layer, torch.float32)
    with torch.inference_mode():
        inputs = layer_inputs(layer, WIDTH)
        simulate_inputs(dense, dict.fromkeys("qkvo", layer), dict.fromkeys("qkvo", inputs), ExpertNames())
    x = tokens().requires_grad_()
    dense(x).square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad != 0).float().mean() > 0.5  # a static range cuts some values off


def test_a_static_range_that_is_not_there_yet_is_the_one_at_hand():
    layer = layer_format("W8A8ZTS", input_scale=True)
    dense, _, inputs = pair(layer, torch.float32)
    scale = inputs["q"].scale
    assert scale is not None
    simulate_inputs(dense, {"q": layer}, {"q": LayerInputs(scale=scale)}, ExpertNames())
    found = seen_by(dense)
    with torch.no_grad():
        dense(tokens())
    dynamic = layer_format("W8A8ZT").activations
    assert dynamic is not None
    assert torch.equal(found["q"], fake_quantize(tokens() * 3 * scale, dynamic))
    assert torch.equal(found["v"], tokens() * 3)  # not named: not touched


def test_nothing_is_touched_where_nothing_is_done(tiny):
    model = Opened(tiny("mixtral"))
    block = model.block(0)
    formats = dict.fromkeys(model.linears(0), layer_format("W4A16G64"))
    simulate_inputs(block, formats, {}, model.skeleton.expert_names)
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not any(isinstance(module, QuantExperts) for module in block.modules())


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4ZB16", "W8A8ZT"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_statistics_are_those_of_the_rounded_input_once_per_tensor(tiny, name, scheme):
    """What ``observe`` finds with simulated inputs: rows on the grid, and one object for all readers of an input."""
    model = Opened(tiny(name))
    layer = layer_format(scheme)
    assert layer.activations is not None
    ids, _ = sample_ids(False)

    def statistics(rounded: bool) -> Any:
        block = model.block(1)
        if rounded:
            simulate_inputs(block, dict.fromkeys(model.linears(1), layer), {}, model.skeleton.expert_names)
        with Streams(model.stream, ids, batch_size=5) as streams:
            streams.advance({"quantised": model.block(0)})
            return observe(
                streams, block, model.linears(1), ("range", "rows"), experts=model.skeleton.expert_names, max_rows=1000
            )

    plain, found = statistics(False), statistics(True)
    assert {path: sorted(plain.shared_by(path)) for path in plain.inputs} == {
        path: sorted(found.shared_by(path)) for path in found.inputs
    }
    q, k = found.inputs["self_attn.q_proj"], found.inputs["self_attn.k_proj"]
    assert q is k
    rows = plain.inputs["self_attn.q_proj"].rows
    assert torch.equal(q.rows, fake_quantize(rows, layer.activations))  # nothing before q is rounded


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheme", "settings"),
    [
        ("llama", "W8A8TS", {}),
        ("llama", "W6A6ZTS", {"input_scale": True}),
        ("llama", "W4A4ZB24", {"input_shift": True}),
        ("opt", "W8A8ZTS", {"input_scale": True, "input_shift": True}),
        ("qwen3_moe", "W8A8TS", {"input_scale": True}),
        ("mixtral", "W4A4Z", {"input_shift": True}),
        ("llama", "W4A4", {"input_op": "hadamard"}),
        ("llama", "W4A4Z", {"input_clip": True}),
        ("qwen3_moe", "W4A4B16", {"input_op": "kronecker", "input_left": 8, "input_clip": True}),
        ("qwen3_moe", "W4A8", {"input_op": "kronecker", "input_left": 8, "input_scale": True}),
    ],
)
def test_a_saved_model_computes_what_was_simulated(tiny, tmp_path: Path, name, scheme, settings):
    """From checkpoint tensors and config.json alone, in the modules that a user's load gets."""
    layer = layer_format(scheme, **settings)
    formats = quantise(tiny(name), tmp_path / "packed", lambda linear: layer, "native", dense=tmp_path / "dense")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    dense = load_plain(tmp_path / "dense")
    inputs, weights = {}, {}
    for linear in formats:
        key = linear.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else linear
        own = {full.removeprefix(f"{key}."): tensor for full, tensor in stored.items() if full.startswith(f"{key}.")}
        weight, inputs[linear] = from_tensors(own, layer)
        weights[linear] = weight.dequantize()
    experts = ExpertNames("w1", "w3", "w2") if name == "mixtral" else ExpertNames()
    simulate_inputs(dense, formats, inputs, experts)
    for linear, weight in weights.items():
        dense.get_submodule(linear).weight.copy_(weight)
    packed = load_plain(tmp_path / "packed")
    assert isinstance(packed.get_submodule(next(iter(formats))), QuantLinear)
    assert torch.equal(logits(packed), logits(dense))
