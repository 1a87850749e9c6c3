"""What is said about the inputs of linears equals what is computed from the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import layer_format, quantise
from tiny_tokenizer import TEXT, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantkit
from quantkit.calibrate.text import Text
from quantkit.errors import RecipeError
from quantkit.eval.activations import SAMPLE, choose, collect
from quantkit.kernels.reference import fake_quantize
from quantkit.layers.quant_linear import QuantLinear

SAMPLE_TEXT = Text("sample", (TEXT * 20,))
TOKENS = 90
"""Two windows of 40 tokens and a rest, which is dropped; more than ``SAMPLE``."""
DOWN = "model.layers.1.mlp.down_proj"


def model_of(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def inputs_of(model: PreTrainedModel, name: str, window: int) -> Tensor:
    """[tokens, channels]: what the linear is called with, window by window, on the first ``TOKENS`` of the text."""
    ids = make_tokenizer()(TEXT * 20, return_tensors="pt")["input_ids"][0, :TOKENS]
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        for start in range(0, TOKENS - window + 1, window):
            model(input_ids=ids[None, start : start + window])
    hook.remove()
    return torch.cat(seen).float()


@pytest.fixture
def windows_of_40(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.eval.activations.SEQLEN", 40)


@pytest.mark.usefixtures("windows_of_40")
def test_a_float_model(source: Callable[..., Path]) -> None:
    model = model_of(source("llama"))
    scheme = layer_format("W4A4").activations
    assert scheme is not None
    found = collect(
        model, make_tokenizer(), SAMPLE_TEXT, names=[DOWN, "not.there"], roundings={DOWN: scheme}, tokens=TOKENS
    )
    assert list(found) == [DOWN]
    one, x = found[DOWN], inputs_of(model, DOWN, 40)
    assert (one.tokens, len(x)) == (80, 80)
    torch.testing.assert_close(one.absmax, x.abs().amax(dim=0), rtol=0, atol=0)
    torch.testing.assert_close(one.sample, x[:SAMPLE], rtol=0, atol=0)
    assert one.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert one.peak == pytest.approx(float(x.abs().max() / x.square().mean().sqrt()), rel=1e-5)
    crests = x.abs().amax(dim=1) / x.square().mean(dim=1).sqrt()
    assert one.crest == pytest.approx(float(crests.mean()), rel=1e-5)
    error = (fake_quantize(x, scheme) - x).square().sum() / x.square().sum()
    assert one.error == pytest.approx(float(error), rel=1e-5)


@pytest.mark.usefixtures("windows_of_40")
def test_a_quantised_layer_shows_what_its_rounding_sees(source: Callable[..., Path], tmp_path: Path) -> None:
    layer = layer_format(
        "W4A4", input_scale=True, input_shift=True, input_op="kronecker", input_left=8, input_clip=True
    )
    quantise(source("llama"), tmp_path, lambda name: layer if name == DOWN else None, "native")
    model, _ = quantkit.load(tmp_path)
    module = model.get_submodule(DOWN)
    assert isinstance(module, QuantLinear)
    one = collect(model, make_tokenizer(), SAMPLE_TEXT, tokens=TOKENS)[DOWN]
    x = inputs_of(model, DOWN, 40) * module.input_scale_vector + module.input_shift_vector
    matrix = torch.kron(module.input_kronecker_left, module.input_kronecker_right)  # v @ (left (x) right)
    x = x @ matrix
    torch.testing.assert_close(one.absmax, x.abs().amax(dim=0), rtol=1e-4, atol=1e-5)
    assert one.rounding == layer.activations
    assert layer.activations is not None
    rounded = fake_quantize(x, layer.activations, clip=module.input_clip)
    assert one.error == pytest.approx(float((rounded - x).square().sum() / x.square().sum()), rel=1e-2)


def test_linears_that_read_one_input_are_shown_once(source: Callable[..., Path]) -> None:
    found = collect(model_of(source("llama")), make_tokenizer(), SAMPLE_TEXT, tokens=50)
    inside = [name.removeprefix("model.layers.0.") for name in found if ".0." in name]
    assert inside == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def test_the_first_the_middle_and_the_last_block() -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "experts": _experts()}) for _ in range(12))
    model = nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 2)})
    expected = [f"layers.{index}.{name}" for index in (0, 6, 11) for name in ("q", "experts.0.up")]
    assert choose(model) == expected
    assert choose(model, ["layers.3.*", "head"]) == [
        "layers.3.q", "layers.3.experts.0.up", "layers.3.experts.1.up", "head",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"no linear is called like 'layer.3.q'; one is layers.0.q"):
        choose(model, ["head", "layer.3.q"])


def _experts() -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(2))


def test_an_encoder(tiny: Callable[..., Path]) -> None:
    """No language model, no positions to spare: it still has inputs."""
    from tiny_models import load_tiny

    model = load_tiny(tiny("bert")).eval()
    ids = model.config.vocab_size

    def tokenizer(text: str, **_: object) -> dict[str, Tensor]:
        return {"input_ids": (torch.arange(60) % ids)[None]}

    assert len(collect(model, tokenizer, SAMPLE_TEXT)) >= 4
