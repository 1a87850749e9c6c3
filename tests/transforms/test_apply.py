"""Whatever a transform returns, the block and what is left online compute what the source's block does."""

from __future__ import annotations

import pytest
import torch
from opened import Opened, sample_ids
from tiny_models import TINY
from torch import Tensor

from quantkit.formats.layer import LayerFormat
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.block import Block
from quantkit.recipe import WeightScheme
from quantkit.transforms import fold
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import SiteChange, Solution

ANY = LayerFormat(weights=WeightScheme(bits=4, group_size=-1, symmetric=True))


def normal(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def random_solution(block: Block, seed: int, linears: list[str]) -> Solution:
    """A scale at every site, a shift where one can be folded, and a scale at some linears by themselves."""
    sites = {}
    for number, site in enumerate(block.sites):
        width = block.weight(site.consumers[0]).shape[1] // site.repeats
        shift = normal(width, seed + number) if fold.shift_obstacle(block, site) is None else None
        sites[site.name] = SiteChange(scale=normal(width, seed + 50 + number).mul(0.3).exp(), shift=shift)
    alone = {
        name: normal(block.weight(name).shape[1], seed + 100 + n).mul(0.3).exp() for n, name in enumerate(linears[:3])
    }
    return Solution(sites, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_two_transforms_leave_the_function(tiny, name, dtype):
    model = Opened(tiny(name))
    ids, mask = sample_ids(padded=False)
    captured = model.stream.capture(ids, mask)
    for index in range(model.skeleton.num_blocks):
        block = model.skeleton.read_block(index, model.checkpoint)
        before = model.stream.run_block(model.block(index), captured.hidden, index, captured)
        linears = model.linears(index)
        state = Transformed(block, linears, dtype, pytest.fail)
        state.apply("one", random_solution(block, 1, linears))
        state.apply("two", random_solution(block, 2, linears))
        module = model.skeleton.build_block(index, block.tensors, torch.float32)
        simulate_inputs(module, dict.fromkeys(state.inputs, ANY), state.inputs, model.skeleton.expert_names)
        after = model.stream.run_block(module, captured.hidden, index, captured)
        assert len(state.inputs) >= 3
        assert all(inputs.scale.dtype == dtype for inputs in state.inputs.values() if inputs.scale is not None)
        torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4 * float(before.abs().max()))


def test_columns_say_by_what_the_weights_were_divided(tiny):
    model = Opened(tiny("llama"))
    block, source = (model.skeleton.read_block(0, model.checkpoint) for _ in range(2))
    linears = model.linears(0)
    state = Transformed(block, linears, torch.float32, pytest.fail)
    # without v -> o and up -> down, which change rows as well
    sites = {"attention.input": SiteChange(scale=normal(64, 1).exp())}
    state.apply("one", Solution(sites, {"self_attn.q_proj": normal(64, 2).exp()}))
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        restored = block.weight(name).double() * state.columns[name]
        torch.testing.assert_close(restored, source.weight(name).double(), rtol=1e-5, atol=0)
    assert "mlp.down_proj" not in state.columns


@pytest.mark.parametrize(
    "change",
    [SiteChange(scale=torch.full((64,), torch.nan)), SiteChange(scale=torch.zeros(64)),
     SiteChange(scale=torch.ones(64), shift=torch.full((64,), torch.inf))],
    ids=["nan", "zero", "infinite shift"],
)  # fmt: skip
def test_numbers_that_are_none_are_left_out_with_a_warning(tiny, change):
    model = Opened(tiny("opt"))
    block, source = (model.skeleton.read_block(1, model.checkpoint) for _ in range(2))
    warnings: list[str] = []
    state = Transformed(block, model.linears(1), torch.float32, warnings.append)
    state.apply("one", Solution({"mlp.input": change}))
    assert all(torch.equal(block.tensors[name], tensor) for name, tensor in source.tensors.items())
    assert warnings == ["model.decoder.layers.1.mlp.input: one found no finite numbers; nothing is transformed there."]
