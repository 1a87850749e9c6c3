"""What is learned about a block leaves its function while it is learned, too, and starts where it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from folded import IDS, Folded
from taught import Taught, taught
from tiny_models import TINY, load_tiny
from torch import Tensor, nn

from quantkit.layers.quant_experts import split_experts
from quantkit.learn import flat, matrices
from quantkit.learn.flat import FlatBlock
from quantkit.learn.places import places
from quantkit.models.block import Site
from quantkit.transforms import flatquant

Source = Callable[[str], Path]


def flat_block(lesson: Taught, **options: Any) -> FlatBlock:
    situation = lesson.looked.situation
    assert situation.observed is not None
    assert situation.observed.lesson is not None
    own = situation.observed.lesson(("quantised",))
    own.targets.close()
    with torch.inference_mode(False), torch.enable_grad():
        return FlatBlock(situation, flatquant.Config(**options), situation.observed, own)


def scatter(learned: FlatBlock) -> None:
    """Every number in float64, and at random."""
    generator = torch.Generator().manual_seed(0)
    for own in learned._places:
        for module in (*own.changes, own.left, own.right, own.value):
            for parameter in () if module is None else module.double().parameters():
                size = 0.5 if parameter.dim() < 3 else 0.5 * parameter.shape[-1] ** -0.5
                parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def logits_of(model: Folded, learned: FlatBlock, tensors: dict[str, Tensor]) -> Tensor:
    """Of the float64 model with ``tensors`` in block 0, inputs changed as in training."""
    whole = load_tiny(model.folder, dtype=torch.float64, experts_implementation="eager")
    blocks = whole.get_submodule(model.skeleton.blocks_path)
    for block in model.blocks():
        own = block.tensors | (tensors if block.index == 0 else {})
        blocks[block.index] = model.skeleton.build_block(block.index, own, torch.float64)
    linears = learned._situation.linears
    split_experts(blocks[0], linears, model.skeleton.expert_names)
    for name in linears if tensors else ():
        blocks[0].get_submodule(name).register_forward_pre_hook(learned.inputs[name])
    # BLOOM's softmax is in float32 whatever the dtype.
    with patch("torch.nn.functional.softmax", lambda x, dim=None, **_: torch.softmax(x, dim)):
        result: Tensor = whole(IDS, use_cache=False).logits
    return result


@pytest.mark.parametrize(("name", "parameterisation"), [*((name, "direct") for name in TINY), ("llama", "svd")])
def test_training_leaves_the_function(source: Source, name: str, parameterisation: str) -> None:
    model = Folded(source(name))
    with taught(source(name), "W4A16GC", flatquant) as lesson:
        learned = flat_block(lesson, parameterisation=parameterisation)
        scatter(learned)
        if model.in_float32:  # its norms compute in float32: powers of two come through that exactly
            for own in learned._places:
                for change in own.changes:
                    change.log_scale.data = (change.log_scale.data / 2**0.5).round() * torch.tensor(2.0).double().log()
        learned._base = {name: model.block(0).tensors[name] for name in learned._base}
        with torch.no_grad():
            tensors = learned._transformed()
        before, after = logits_of(model, learned, {}), logits_of(model, learned, tensors)
        hooks = set(learned.inputs.values())
        assert all(hook.op.op == "kronecker" for hook in hooks)
        for hook in hooks:
            hook.forget()
            hook.op = type(hook.op)()
        without = logits_of(model, learned, tensors)
    # Orthogonal starts are so to float32: that is all the other form promises.
    assert float((after - before).norm() / before.norm()) < (1e-10 if parameterisation == "direct" else 1e-5)
    assert float((without - before).norm() / before.norm()) > 1e-2


def test_places() -> None:
    sites = [
        Site("attention.input", "norm", "ln", ("q", "k", "v")),
        Site("attention.value", "linear", "v", ("o",), repeats=2, head_dim=8),
        Site("mlp.experts.0.hidden", "linear", "mlp.experts.0.up", ("mlp.experts.0.down",)),
        Site("mlp.experts.12.hidden", "linear", "mlp.experts.12.up", ("mlp.experts.12.down",)),
        Site("mlp.input", "norm", "ln2", ("router",)),
    ]
    linears = ["q", "v", "o", "mlp.experts.0.down", "mlp.experts.12.down", "dense"]
    found = {place.label: place.linears for place in places(sites, linears)}
    assert found == {
        "attention.input": ("q", "v"),
        "attention.output": ("o",),
        "mlp.experts.*.hidden": ("mlp.experts.0.down", "mlp.experts.12.down"),
        "dense": ("dense",),
    }


def test_every_matrix_is_inverted_once_in_a_step(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with taught(source("llama"), "W4A4", flatquant) as lesson:
        learned = flat_block(lesson)
        calls: list[tuple[int, ...]] = []

        turn = matrices.cayley

        def counted(entries: Tensor) -> Tensor:  # its matrices make P and P**-T
            calls.append(tuple(entries.shape[1:]))
            return turn(entries)

        monkeypatch.setattr(matrices, "cayley", counted)
        learned.tensors()
    # two of 64 and one of 104 columns, 4 heads, and 2 heads of values
    assert sorted(calls) == sorted([(1, 8, 8)] * 5 + [(1, 13, 13), (1, 4, 4), (2, 16, 16)])


def test_values_that_nothing_can_be_folded_into_are_mixed_at_run_time(source: Source) -> None:
    with taught(source("llama"), "W4A4", flatquant) as lesson:
        found = []
        for linears in (lesson.looked.linears, [name for name in lesson.looked.linears if "v_proj" not in name]):
            lesson.looked.situation = replace(lesson.looked.situation, linears=linears)
            learned = flat_block(lesson)
            found.append(next(own for own in learned._places if own.place.label == "attention.output"))
        folded, mixed = found
        assert folded.value is not None
        assert torch.equal(folded.ops()[0].right, torch.eye(16))
        assert mixed.value is None
        assert mixed.ops()[0].right.shape == (16, 16)
        assert float(mixed.ops()[0].right.detach().abs().max()) < 0.3


@pytest.mark.parametrize("start", ["rms", "smoothquant", "one"])
def test_scales_start_by_their_rule(source: Source, start: str) -> None:
    with taught(source("llama"), "W4A4", flatquant) as lesson:
        learned = flat_block(lesson, diag_start=start, alpha=0.25)
        block, statistics = lesson.looked.block, lesson.looked.situation.observed.statistics
        seen = statistics.inputs["mlp.up_proj"]
        weight = torch.cat([block.weight("mlp.gate_proj"), block.weight("mlp.up_proj")])
        scales = {site.name: scale for own in learned._places for site, scale in own.scales()}
    if start == "rms":
        want = (weight.square().mean(0).sqrt() / seen.rows.square().mean(0).sqrt()).sqrt()
    elif start == "smoothquant":
        want = weight.abs().amax(0) ** 0.75 / seen.absmax**0.25
    else:
        want = torch.ones(64)
    torch.testing.assert_close(scales["mlp.input"].detach(), want / want.median(), rtol=1e-4, atol=0)
    assert "attention.value" not in scales


def test_limits_start_where_the_search_has_them(source: Source) -> None:
    with taught(source("llama"), "W3A3", flatquant) as lesson:
        learned = flat_block(lesson)
        shares = [own.shares for own in learned._places]
        clips = list(learned._clips.values())
        assert len(shares) == 4
        assert len(clips) == 7
        for kind, logits in (("weights", [clip.logits for clip in clips]), ("inputs", shares)):
            found = []
            for share in (0.0, 0.5, 1.0):
                learned.start_limits(kind, share)  # type: ignore[arg-type]
                found.append(torch.cat([own.detach().sigmoid().flatten() for own in logits]))
            torch.testing.assert_close(found[0], torch.full_like(found[0], 0.982), rtol=0, atol=1e-3)
            assert (found[2] <= found[0]).all()
            assert float(found[2].mean()) < 0.95
            moved = found[2] < 0.9
            torch.testing.assert_close(found[1][moved], (1 + found[2][moved]) / 2, rtol=1e-4, atol=0)


def test_nothing_is_concluded_from_few_tokens(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that hardly any token reaches: one matrix for all of them, no scales or limits of their own."""
    with taught(source("mixtral"), "W4A4", flatquant) as lesson:
        counts = {
            n: len(lesson.looked.situation.observed.statistics.inputs[f"mlp.experts.{n}.w2"].rows) for n in range(5)
        }
        monkeypatch.setattr(flat, "FEWEST_ROWS", sorted(counts.values())[2])
        learned = flat_block(lesson)
        own = next(own for own in learned._places if own.place.label == "mlp.experts.*.hidden")
        many = {n for n, count in counts.items() if count >= sorted(counts.values())[2]}
        assert 0 < len(many) < 5
        assert {change.site.name for change in own.changes} == {f"mlp.experts.{n}.hidden" for n in many}
        assert {name for name in learned._clips if "w2" in name} == {f"mlp.experts.{n}.w2" for n in many}
        assert len(own.place.linears) == 5
        monkeypatch.setattr(flat, "FEWEST_ROWS", 10**6)
        assert not any(group.parameters for group in flat_block(lesson).groups())


def test_ranges_have_gradients_without_clips_of_their_own(source: Source) -> None:
    """Else nothing would draw the matrices to inputs that are easier to round."""
    with taught(source("llama"), "W4A4", flatquant) as lesson:
        learned = flat_block(lesson, activation_clip=False)
        learned.tensors()
        hook = learned.inputs["mlp.up_proj"]
        assert hook.clip is not None
        assert torch.equal(hook.clip, torch.ones(2))
        assert not learned.solution({}).clips
        x = torch.zeros(1, 64).requires_grad_()
        with torch.no_grad():
            x[0, 3], x[0, 9] = 2.0, 0.9
        hook.op = type(hook.op)()
        hook.scale = None
        out: Tensor = hook(nn.Identity(), (x,))[0]
        out[0, 9].backward()
        assert x.grad is not None
        assert float(x.grad[0, 3]) != 0  # the largest value makes the step


def test_gradients_reach_everything(source: Source) -> None:
    with taught(source("qwen3"), "W4A4", flatquant) as lesson:
        learned = flat_block(lesson)
        own = learned.inputs["self_attn.q_proj"]
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
        total = sum(tensor.square().sum() for tensor in learned.tensors().values())
        changed = own(nn.Identity(), (x,))[0]
        others = [learned.inputs[name] for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")]
        widths = (64, 96, 128)
        rest = [hook(nn.Identity(), (torch.randn(4, width),))[0] for hook, width in zip(others, widths, strict=True)]
        (total + changed.square().sum() + sum(y.square().sum() for y in rest)).backward()
        for group in learned.groups():
            for parameter in group.parameters:
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
                assert parameter.grad.any()
