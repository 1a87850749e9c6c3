import pytest
import torch
from handmade import layer_format, round_to_nearest
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from quantkit.formats.layer import to_tensors
from quantkit.layers.quant_experts import ExpertNames, QuantExperts
from quantkit.layers.quant_linear import QuantLinear

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 40, 6, 2
NAMES = ExpertNames("w1", "w3", "w2")


@pytest.fixture
def pair() -> tuple[QuantExperts, MixtralExperts]:
    """Experts one by one, number 2 in full precision, and transformers' merged ones with the same weights."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    merged = MixtralExperts(config)
    merged.config._experts_implementation = "eager"
    layer = layer_format("W4ZA16G16")
    experts = []
    with torch.no_grad():
        for index in range(EXPERTS):
            linears: list[nn.Module] = []
            for shape in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
                weight = round_to_nearest(torch.randn(shape) * 0.2, layer, torch.float32)
                linear: nn.Module
                if index == 2:
                    linear = nn.Linear(shape[1], shape[0], bias=False)
                    linear.weight.copy_(weight.dequantize())
                else:
                    linear = QuantLinear(shape[1], shape[0], False, layer, torch.float32)
                    linear.load_state_dict(to_tensors(weight, layer))
                linears.append(linear)
                dense = weight.dequantize()
                if len(linears) < 3:
                    merged.gate_up_proj[index, (len(linears) - 1) * INTERMEDIATE :][:INTERMEDIATE] = dense
                else:
                    merged.down_proj[index] = dense
            experts.append((linears[0], linears[1], linears[2]))
    return QuantExperts(experts, NAMES, merged.act_fn), merged


def route(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.rand(tokens, experts).argsort(dim=1)[:, :TOP_K]  # each token's experts differ
    return torch.randn(tokens, HIDDEN), index, torch.rand(tokens, TOP_K)


@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_equals_the_merged_experts(pair, tokens):
    split, merged = pair
    x, index, weights = route(tokens, EXPERTS)
    with torch.no_grad():
        torch.testing.assert_close(split(x, index, weights), merged(x, index, weights), rtol=1e-5, atol=1e-6)


def test_the_number_past_the_last_stands_for_no_expert(pair):
    split, merged = pair
    x, index, weights = route(5, EXPERTS)
    index[:, 1] = EXPERTS
    with torch.no_grad():
        torch.testing.assert_close(split(x, index, weights), merged(x, index, weights), rtol=1e-5, atol=1e-6)


def test_names_are_those_of_the_checkpoint(pair):
    names = pair[0].state_dict().keys()
    assert {"0.w1.weight_packed", "5.w2.weight_zero_point", "2.w3.weight"} <= names
    assert "2.w3.weight_packed" not in names
