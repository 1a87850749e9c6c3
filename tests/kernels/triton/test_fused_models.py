"""Loaded models whose norms and MLPs make codes: the same logits, and no input rounded a second time.

CPU tensors stand for those on a GPU, and Triton's interpreter for it.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from handmade import assert_saved_as_loaded, layer_format, load_plain, logits, quantise
from tiny_models import TINY, make_tiny
from torch import Tensor, nn

from quantkit.kernels import dispatch, input_codes
from quantkit.kernels.triton import activation, fused, integer, weight_only
from quantkit.layers import fusing
from quantkit.layers.fusing import FusedMLP, FusedNorm
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.sharing import SharedInput

pytestmark = pytest.mark.usefixtures("kernels")
Tiny = Callable[..., Path]
Load = Callable[..., Any]


@pytest.fixture
def gpu(
    interpreted_inputs: dict[ModuleType, ModuleType],
    interpreted_integer_kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> Counter[str]:
    """Runs every layer as on a GPU; counts what makes codes."""
    calls: Counter[str] = Counter()

    def counted(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*given, **named)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(integer, "_kernels", lambda: interpreted_integer_kernels)
    monkeypatch.setattr(weight_only, "incapable", lambda device: None)
    monkeypatch.setattr(fused, "runs_on", lambda x: x.dtype in activation.DTYPES)
    row = dispatch.Implementation(
        "triton integer", lambda layer, device: integer.refuses(layer, torch.device("cuda")), integer.run,
        dispatch._BYTES,
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (row, dispatch.IMPLEMENTATIONS[-1]))
    counted(fused, "norm_quantize")
    counted(fused, "gated_quantize")
    counted(input_codes, "quantize")
    return calls


@pytest.fixture
def load(tiny: Tiny, tmp_path: Path) -> Load:
    def make(name: str, scheme: str = "W8A8", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        quantise(tiny(name, dtype), tmp_path / "packed", lambda _: layer_format(scheme, **settings), "native")
        return load_plain(tmp_path / "packed")

    return make


def apart(model: nn.Module) -> nn.Module:
    """``model`` as it would be without any of this."""
    for module in model.modules():
        if isinstance(module, (FusedNorm, FusedMLP)):
            module.__class__ = type(module).__bases__[1]
    return model


def assert_same(found: Tensor, want: Tensor) -> None:
    """But for codes next to the middle of two, of values whose last digit another order of summation changed."""
    assert float((found - want).norm() / want.norm()) < 1e-3


def few(model: nn.Module) -> Tensor:
    return logits(model, batch=1, length=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "per_block"),
    [
        ("llama", {"norm_quantize": 2, "gated_quantize": 1, "quantize": 1}),
        ("gemma2", {"norm_quantize": 2, "gated_quantize": 1, "quantize": 1}),
        ("phi3", {"norm_quantize": 2, "gated_quantize": 1, "quantize": 1}),
        ("opt", {"norm_quantize": 2, "quantize": 2}),
    ],
)
def test_same_logits_and_no_second_rounding(gpu, load, name, per_block):
    model = load(name)
    found = few(model)
    assert gpu == {kind: number * model.config.num_hidden_layers for kind, number in per_block.items()}
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all(layer.shared_input is None or layer.shared_input._last is None for layer in linears)
    gpu.clear()
    want = few(apart(model))
    assert gpu == {"quantize": 4 * model.config.num_hidden_layers}
    assert_same(found, want)


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("W4A8Z", {"input_scale": True, "input_shift": True}), ("W8A8ZTS", {}), ("W4A4", {"input_clip": True})],
)
def test_other_formats(gpu, load, scheme, settings):
    """Every layer has an input scale of its own: of q, k and v one reads the norm's codes, two round for themselves."""
    model = load("llama", scheme, **settings)
    found = few(model)
    assert gpu["norm_quantize"] == 4
    assert gpu["gated_quantize"] == 2
    own = bool(settings)
    assert gpu["quantize"] == (2 * (1 + 2 + 1) if own else 2)
    with torch.no_grad():
        want = few(apart(model))
    if scheme == "W4A4":  # a code is a fifteenth
        assert float((found - want).norm() / want.norm()) < 0.1
    else:
        assert_same(found, want)


def test_experts_and_norms_that_are_read_as_views(gpu, load):
    """Experts make codes of their gates; the norm before a mixture stops offering what nobody takes."""
    model = load("qwen2_moe")
    found = few(model)
    block = model.model.layers[1]
    assert block.post_attention_layernorm.codes.useful
    gpu.clear()
    assert torch.equal(few(model), found)
    assert not block.post_attention_layernorm.codes.useful
    assert model.model.layers[0].post_attention_layernorm.codes.useful  # a dense block
    assert block.mlp.shared_expert.gate_proj.shared_input._last is None
    assert gpu["norm_quantize"] == 4
    gpu.clear()
    assert_same(few(model), found)
    assert gpu["norm_quantize"] == 3
    assert gpu["gated_quantize"] > 3  # a dense MLP, a shared expert, and experts
    assert_same(few(apart(model)), found)


def _norm_changes(block: Any) -> None:
    block.input_layernorm.register_forward_hook(lambda module, args, y: y.mul_(2))


def _attention_changes(block: Any) -> None:
    def double(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 2}

    block.self_attn.register_forward_pre_hook(double, with_kwargs=True)


def _down_changes(block: Any) -> None:
    block.mlp.down_proj.register_forward_pre_hook(lambda module, args: args[0] * 2)


def _gate_changes(block: Any) -> None:
    block.mlp.act_fn.register_forward_hook(lambda module, args, y: y * 2)


@pytest.mark.parametrize("change", [_norm_changes, _attention_changes, _down_changes, _gate_changes])
def test_hooks_see_and_change_what_they_did_before(gpu, load, change):
    """Also where nothing counts what is done to a tensor in place."""
    model = load("llama")
    with torch.inference_mode():
        before = few(model)
        change(model.model.layers[0])
        found = few(model)
        assert not torch.allclose(found, before, rtol=0.02)
        assert_same(found, few(apart(model)))


def test_gradients_autocast_and_other_dtypes_go_the_ordinary_way(gpu, load):
    model = load("llama")
    tokens = torch.tensor([[5, 6, 7]])
    with dispatch.only_reference():
        few(model)
    assert not {"norm_quantize", "gated_quantize"} & set(gpu)
    model(tokens).logits.sum().backward()
    norm = model.model.layers[0].input_layernorm
    assert norm.weight.grad is not None
    assert norm(torch.randn(1, 2, 64)).requires_grad  # for its weight, though not for its input
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert not {"norm_quantize", "gated_quantize"} & set(gpu)
    norm.double()
    with torch.no_grad():
        assert norm(torch.randn(1, 2, 64)).dtype == torch.float64
    assert not gpu["norm_quantize"]


def test_on_this_machine_nothing_is_fused(load, monkeypatch):
    """CPU tensors never reach a kernel of Triton."""
    monkeypatch.setattr(fused, "norm_quantize", None)
    monkeypatch.setattr(fused, "gated_quantize", None)
    model = load("llama")
    assert isinstance(model.model.layers[0].input_layernorm, FusedNorm)
    assert isinstance(model.model.layers[0].mlp, FusedMLP)
    found = few(model)
    assert torch.equal(few(apart(model)), found)


@pytest.mark.parametrize(("scheme", "settings"), [("W4A16G32", {}), ("W8A8", {"input_op": "hadamard"}), ("W8A8T", {})])
def test_inputs_that_the_kernels_do_not_make_are_left_alone(load, scheme, settings):
    model = load("llama", scheme, **settings)
    assert not any(isinstance(module, (FusedNorm, FusedMLP)) for module in model.modules())


def test_codes_are_for_the_most_readers():
    """k and v do the same to their input, q something else."""
    norm = nn.LayerNorm(32)
    q, k, v = (QuantLinear(32, 8, False, layer_format("W8A8"), torch.float32) for _ in range(3))
    k.shared_input = v.shared_input = SharedInput(2)
    fusing._fuse_norm(norm, [nn.Linear(32, 8), q, k, v])
    assert isinstance(norm, FusedNorm)
    assert norm.codes.reader is k
    assert q.shared_input is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_by_themselves_and_what_is_saved_stays(gpu, load, tmp_path, copied):
    model = load("llama")
    text = str(model)
    want = few(model)
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "saved")
    twin = copied(model)
    norm = twin.model.layers[0].input_layernorm
    assert type(norm) is type(model.model.layers[0].input_layernorm)
    assert norm.codes.reader is twin.model.layers[0].self_attn.q_proj
    del model
    gpu.clear()
    assert torch.equal(few(twin), want)
    assert gpu["norm_quantize"] == 4
    assert gpu["quantize"] == 2
    assert str(twin) == text == str(apart(twin))


def test_replicas_run_with_their_own_weights(gpu, load):
    """Of ``DataParallel``: shallow copies whose parameters are on another device."""
    norm = load("llama").model.layers[0].input_layernorm
    replica = norm._replicate_for_data_parallel()
    replica._parameters = {"weight": norm.weight.detach() * 2}
    x = torch.randn(1, 2, 64)
    with torch.no_grad():
        torch.testing.assert_close(replica(x), 2 * norm(x))


def test_compilers_see_the_model_as_it_is(gpu, load):
    model = load("llama")
    block = model.model.layers[0]
    x = torch.randn(1, 2, 64)
    with torch.no_grad():
        want = block.mlp(block.post_attention_layernorm(x))
        gpu.clear()
        compiled = torch.compile(lambda x: block.mlp(block.post_attention_layernorm(x)), backend="eager")
        assert_same(compiled(x), want)
    assert not {"norm_quantize", "gated_quantize"} & set(gpu)


NORMS = {"gemma2": "gemma", "gemma3": "gemma", "opt": "layer", "bloom": "layer", "gpt_neox": "layer", "bert": "layer"}
MLPS = {"llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "gemma2": "gelu", "gemma3": "gelu",
        "phi3": "silu", "qwen2_moe": "silu"}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_norms_and_gates_of_every_architecture_are_known(name):
    model = make_tiny(TINY[name]())
    kinds = {fusing.norm_kind(part) for part in model.modules() if "Norm" in type(part).__name__}
    assert kinds == {NORMS.get(name.removesuffix("_classifier"), "llama")}
    mlps = [part for part in model.modules() if fusing._has_known_mlp(part)]
    assert {fusing.activation_name(fusing._activation_function(mlp)) for mlp in mlps} == (
        {MLPS[name]} if name in MLPS else set()
    )


def test_another_forward_is_another_module():
    class Doubled(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(4).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    assert fusing.norm_kind(Doubled()) is None
    assert fusing.norm_kind(nn.LayerNorm(8, elementwise_affine=False)) is None
    assert fusing.norm_kind(nn.LayerNorm((2, 8))) is None
    for function in (F.gelu, nn.GELU(), nn.ReLU(), torch.tanh):
        assert fusing.activation_name(function) is None
    assert fusing.activation_name(nn.GELU(approximate="tanh")) == "gelu"
