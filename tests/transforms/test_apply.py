"""Whatever a transform returns, the block and what is left online compute what the source's block does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from opened import Opened, sample_ids
from tiny_models import TINY
from torch import Tensor

from quantkit.formats.kv import LearnedKV
from quantkit.formats.layer import LayerFormat, LayerInputs
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


def random_op(width: int, kind: int, seed: int) -> LayerInputs:
    """One of the three kinds of matrices, well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    if kind == 0:
        return LayerInputs(signs=normal(width, seed).sign().to(torch.int8))
    if kind == 1:
        return LayerInputs(left=square[:4, :4], right=square[: width // 4, : width // 4])
    return LayerInputs(matrix=square)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_scales_shifts_and_then_matrices_leave_the_function(tiny, name, dtype):
    """Matrices rounded to bfloat16 are no worse: their inverse is that of what is stored."""
    model = Opened(tiny(name))
    ids, mask = sample_ids(padded=False)
    captured = model.stream.capture(ids, mask)
    block = model.skeleton.read_block(1, model.checkpoint)
    before = model.stream.run_block(model.block(1), captured.hidden, 1, captured)
    linears = model.linears(1)
    state = Transformed(block, linears, dtype, pytest.fail)
    state.apply("one", random_solution(block, 1, linears))
    ops = {path: random_op(block.weight(path).shape[1], n % 3, n) for n, path in enumerate(linears)}
    heads = {site.name: torch.eye(site.head_dim).roll(1, 0) * 2 for site in block.sites if site.head_dim}
    both = random_solution(block, 2, linears)
    state.apply("two", replace(both, matrices=heads, ops=ops))
    lefts = [state.inputs[path].left for path in linears]
    assert {left.dtype for left in lefts if left is not None} == {dtype}
    module = model.skeleton.build_block(1, block.tensors, torch.float32)
    simulate_inputs(module, dict.fromkeys(state.inputs, ANY), state.inputs, model.skeleton.expert_names)
    after = model.stream.run_block(module, captured.hidden, 1, captured)
    torch.testing.assert_close(after, before, rtol=5e-4, atol=5e-4 * float(before.abs().max()))


def test_no_channel_is_changed_behind_a_matrix(tiny):
    model = Opened(tiny("llama"))
    block = model.skeleton.read_block(0, model.checkpoint)
    state = Transformed(block, model.linears(0), torch.float32, pytest.fail)
    state.apply("one", Solution(ops={"mlp.up_proj": random_op(64, 0, 1), "mlp.down_proj": random_op(104, 1, 1)}))
    before = {name: tensor.clone() for name, tensor in block.tensors.items()}
    for solution in (
        Solution({"mlp.input": SiteChange(scale=torch.ones(64))}),
        Solution(linears={"mlp.down_proj": torch.ones(104)}),
        Solution(ops={"mlp.down_proj": random_op(104, 2, 1)}),
    ):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\w+: two changes channels behind a \w+ matrix"):
            state.apply("two", solution)
    assert all(torch.equal(block.tensors[name], tensor) for name, tensor in before.items())
    state.apply("two", Solution(linears={"mlp.gate_proj": torch.full((64,), 2.0)}))  # has none


@pytest.mark.parametrize(
    ("solution", "problem"),
    [
        (Solution(ops={"mlp.up_proj": LayerInputs(matrix=torch.full((64, 64), torch.nan))}), "no finite numbers"),
        (Solution(ops={"mlp.up_proj": LayerInputs(matrix=torch.ones(64, 64))}), "a singular matrix"),
        (Solution(ops={"mlp.up_proj": LayerInputs(left=torch.zeros(8, 8), right=torch.eye(8))}), "a singular matrix"),
        (Solution(matrices={"attention.value": torch.full((16, 16), torch.inf)}), "no finite numbers"),
        (Solution(matrices={"attention.value": torch.zeros(16, 16)}), "a singular matrix"),
    ],
    ids=["nan", "singular", "singular factor", "infinite heads", "singular heads"],
)
def test_matrices_that_cannot_be_undone_are_left_out_with_a_warning(tiny, solution, problem):
    model = Opened(tiny("llama"))
    block, source = (model.skeleton.read_block(1, model.checkpoint) for _ in range(2))
    warnings: list[str] = []
    state = Transformed(block, model.linears(1), torch.float32, warnings.append)
    state.apply("one", solution)
    assert all(torch.equal(block.tensors[name], tensor) for name, tensor in source.tensors.items())
    assert not state.inputs
    assert len(warnings) == 1
    assert warnings[0].endswith(f": one found {problem}; nothing is transformed there.")


def test_clips_are_kept_as_stored_and_given_up_where_the_input_changes(tiny):
    model = Opened(tiny("llama"))
    block = model.skeleton.read_block(0, model.checkpoint)
    warnings: list[str] = []
    state = Transformed(block, model.linears(0), torch.bfloat16, warnings.append)
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    state.apply("one", Solution(clips=dict.fromkeys(names, torch.tensor([0.71, 0.9]))))
    assert torch.equal(state.inputs["mlp.up_proj"].clip, torch.tensor([0.71, 0.9]).bfloat16())
    own = Solution(
        {"attention.input": SiteChange(scale=normal(64, 1).exp())},
        matrices={"attention.value": torch.eye(16)},
        ops={"mlp.up_proj": random_op(64, 0, 1)},
        clips={"mlp.up_proj": torch.tensor([0.5, 0.5])},
    )
    state.apply("two", own)
    held = {name: inputs.clip for name, inputs in state.inputs.items() if inputs.clip is not None}
    assert held.keys() == {"mlp.up_proj", "mlp.down_proj"}
    assert float(held["mlp.up_proj"][0]) == 0.5
    place = "model.layers.0.mlp.up_proj and 2 more"
    assert warnings == [f"{place}: clips of inputs are given up where these were transformed again."]


def test_what_was_found_behind_a_matrix_goes_with_it(tiny):
    """It was found for another basis."""
    model = Opened(tiny("llama"))
    block, source = (model.skeleton.read_block(0, model.checkpoint) for _ in range(2))
    warnings: list[str] = []
    state = Transformed(block, model.linears(0), torch.float32, warnings.append)
    clip, limit = torch.tensor([0.5, 0.5]), torch.ones(1, 1)
    t = normal(104, 1).exp()
    solution = Solution(
        {"mlp.hidden": SiteChange(scale=t)},
        ops={"mlp.down_proj": LayerInputs(left=torch.full((8, 8), torch.nan), right=torch.eye(13))},
        clips={"mlp.down_proj": clip, "mlp.up_proj": clip},
        limits={"mlp.down_proj": (-limit, limit), "mlp.up_proj": (-limit, limit)},
    )
    state.apply("one", solution)
    assert set(state.limits) == set(state.inputs) == {"mlp.up_proj"}
    assert len(warnings) == 1
    torch.testing.assert_close(block.weight("mlp.down_proj") * t, source.weight("mlp.down_proj"))  # c stays, undone
    torch.testing.assert_close(block.weight("mlp.up_proj") / t[:, None], source.weight("mlp.up_proj"))


@pytest.mark.parametrize("clip", [[0.0, 0.5], [0.5, 1.01], [torch.nan, 0.5]], ids=str)
def test_shares_that_are_none_are_left_out_with_a_warning(tiny, clip):
    model = Opened(tiny("llama"))
    warnings: list[str] = []
    block = model.skeleton.read_block(0, model.checkpoint)
    state = Transformed(block, model.linears(0), torch.float32, warnings.append)
    state.apply("one", Solution(clips={"mlp.up_proj": torch.tensor(clip)}))
    assert not state.inputs
    assert warnings == [
        "model.layers.0.mlp.up_proj: one found shares of a range that are not above 0 and at most 1; nothing is "
        "clipped there."
    ]


@pytest.mark.parametrize(
    ("learned", "problem"),
    [
        (LearnedKV(torch.ones(2), torch.ones(2), torch.zeros(16, 16)), "no matrix for keys that has an inverse"),
        (LearnedKV(torch.ones(2), torch.ones(2), torch.eye(16) * torch.nan), "no matrix for keys that has an inverse"),
        (LearnedKV(torch.tensor([0.5, 1.5]), torch.ones(2)), "shares of a range that are not above 0 and at most 1"),
        (
            LearnedKV(torch.ones(2), torch.tensor([torch.nan, 1.0])),
            "shares of a range that are not above 0 and at most 1",
        ),
    ],
)
def test_unsound_keys_and_values_are_left_out_with_a_warning(tiny, learned, problem):
    model = Opened(tiny("llama"))
    block = model.skeleton.read_block(0, model.checkpoint)
    warnings = []
    state = Transformed(block, model.linears(0), torch.bfloat16, warnings.append)
    sound = LearnedKV(torch.tensor([0.9, 0.8]), torch.ones(2), torch.eye(16) / 3)
    state.apply("one", Solution(kv={"self_attn": sound}))
    assert {tensor.dtype for tensor in state.kv["self_attn"].tensors().values()} == {torch.bfloat16}  # as stored
    state.kv.clear()
    state.apply("one", Solution(kv={"self_attn": learned}))
    assert warnings == [
        f"model.layers.0.self_attn: one found {problem}; nothing is changed about keys and values there."
    ]
    assert not state.kv


def test_limits_of_weights_that_are_rotated_are_given_up(tiny):
    model = Opened(tiny("llama"))
    block = model.skeleton.read_block(0, model.checkpoint)
    warnings: list[str] = []
    state = Transformed(block, model.linears(0), torch.float32, warnings.append)
    limit = torch.ones(1, 1)
    names = ("self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")
    state.apply("one", Solution(limits=dict.fromkeys(names, (-limit, limit))))
    own = Solution(
        matrices={"attention.value": torch.eye(16)},
        ops={"mlp.up_proj": random_op(64, 0, 1)},
        limits={"mlp.up_proj": (-2 * limit, 2 * limit)},
    )
    state.apply("two", own)
    assert set(state.limits) == {"mlp.up_proj", "mlp.gate_proj"}
    assert state.limits["mlp.up_proj"][1] == 2  # found for the rotated weight
    place = "model.layers.0.self_attn.v_proj and 1 more"
    assert warnings == [f"{place}: limits of weights are given up where these were transformed again."]
