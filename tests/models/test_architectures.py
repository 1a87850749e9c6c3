"""The tables are exact: scaling a site's producer and unscaling its consumers never moves the logits.

The scaling here is written from the site's description alone, in float64, so that a wrong consumer, row order, head
layout or norm offset shows as a difference many orders above rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, VOCABULARY, save_tiny
from torch import Tensor

from quantkit.models.architectures import ARCHITECTURES
from quantkit.models.block import Block, Site
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.models.stream import BlockStream

ATTENTION = {"attention.input", "attention.value"}
GATED = ATTENTION | {"mlp.input", "mlp.hidden"}
SITES = {
    "opt": GATED,
    "bloom": ATTENTION | {"mlp.input"},
    "gpt_neox": ATTENTION | {"mlp.input"},
    "mixtral": ATTENTION | {"mlp.input"} | {f"mlp.experts.{e}.hidden" for e in range(5)},
    "qwen2_moe": ATTENTION | {"mlp.input", "mlp.shared_expert.hidden"} | {f"mlp.experts.{e}.hidden" for e in range(6)},
    "qwen3_moe": ATTENTION | {"mlp.input"} | {f"mlp.experts.{e}.hidden" for e in range(6)},
    "bert": ATTENTION | {"mlp.input"},
    "bert_classifier": ATTENTION | {"mlp.input"},
}
"""Sites of the last block; families not named here have the gated set."""


def skeleton_of(folder: Path) -> tuple[Skeleton, Checkpoint]:
    checkpoint = Checkpoint.open(folder)
    config = load_config(folder)
    config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    return Skeleton(config, checkpoint), checkpoint


def with_all_experts(name: str) -> dict[str, Any]:
    """Settings under which every token visits every expert, so that none can be wrong unseen."""
    return {"mixtral": {"num_experts_per_tok": 5}, "qwen2_moe": {"num_experts_per_tok": 6}}.get(name) or (
        {"num_experts_per_tok": 6} if name == "qwen3_moe" else {}
    )


Online = dict[str, Tensor]
"""Linear -> t [in_features] that its input is multiplied by."""
Change = Callable[[Block], Online]


def apply(block: Block, site: Site, t: Tensor) -> Online:
    """Multiply what the consumers read by t [signal width], in the producer if there is one, and divide their columns
    by it."""
    columns = t
    if site.repeats > 1:
        columns = torch.stack([t.view(-1, site.head_dim)] * site.repeats, dim=1).flatten()
    for consumer in site.consumers:
        block.tensors[f"{consumer}.weight"] /= columns
    if site.kind == "none":
        return dict.fromkeys(site.consumers, columns)
    weight, bias = f"{site.producer}.weight", block.tensors.get(f"{site.producer}.bias")
    if site.kind == "norm":
        block.tensors[weight] = (site.norm_offset + block.tensors[weight]) * t - site.norm_offset
        if bias is not None:
            bias *= t
    else:
        rows = torch.arange(len(block.tensors[weight])) if site.rows is None else site.rows
        block.tensors[weight][rows] *= t[:, None]
        if bias is not None:
            bias[rows] *= t
    return {}


def keep(block: Block) -> Online:
    """No change."""
    return {}


class Run:
    """A model in float64, its blocks changed before they run."""

    def __init__(self, folder: Path) -> None:
        self.skeleton, self.checkpoint = skeleton_of(folder)
        self.stream = BlockStream(self.skeleton, self.checkpoint, torch.float64)
        ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
        self.captured = self.stream.capture(ids)

    def block(self, index: int, hidden: Tensor, change: Change, watch: Callable[..., None] | None = None) -> Tensor:
        """hidden behind block ``index``; ``watch`` is called with (path, input) of every module in it."""
        block = self.skeleton.read_block(index, self.checkpoint)
        for name, tensor in block.tensors.items():  # 1/256: exact when scaled, also in float32
            block.tensors[name] = (tensor.double() * 256).round() / 256 if tensor.dim() == 1 else tensor.double()
        online = change(block)
        module = self.skeleton.build_block(index, block.tensors, torch.float64)
        for path, t in online.items():
            module.get_submodule(path).register_forward_pre_hook(lambda _, args, t=t: (args[0] * t,))
        for path, part in module.named_modules() if watch else ():
            part.register_forward_pre_hook(lambda _, args, path=path: watch(path, *args[:1]))
        return self.stream.run_block(module, hidden, index, self.captured)

    def logits(self, change: Change) -> Tensor:
        """[2, 16, V]; [2, labels] of a classifier."""
        hidden = self.captured.hidden
        for index in range(self.skeleton.num_blocks):
            hidden = self.block(index, hidden, change)
        return self.stream.logits(hidden, self.captured)


def scale_sites(block: Block, only: str | None = None) -> Online:
    generator = torch.Generator().manual_seed(block.index)
    online: Online = {}
    for site in block.sites:
        if only in (None, site.name):
            width = block.weight(site.consumers[0]).shape[1] // site.repeats
            if site.norm_offset:  # Gemma's norm computes in float32: powers of two leave its rounding as it is
                t = 2.0 ** torch.randint(-2, 3, (width,), generator=generator).double()
            else:
                t = torch.rand(width, generator=generator, dtype=torch.float64) * 3 + 0.2
            online |= apply(block, site, t)
    return online


def assert_exact(run: Run) -> None:
    before, after = run.logits(keep), run.logits(scale_sites)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_sites_are_exact(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, **with_all_experts(name))
    assert_exact(Run(tmp_path))


@pytest.mark.parametrize("name", TINY)
def test_every_consumer_counts(name: str, tmp_path: Path) -> None:
    """Leaving out a consumer of a site changes the block: each is really read, and the check above would see it."""
    save_tiny(name, tmp_path, **with_all_experts(name))
    run = Run(tmp_path)
    before = run.block(1, run.captured.hidden, keep)
    for site in run.skeleton.sites(1):
        for left_out in {site.consumers[0], site.consumers[-1]}:

            def change(block: Block, site: Site = site, left_out: str = left_out) -> Online:
                kept = block.tensors[f"{left_out}.weight"].clone()
                online = scale_sites(block, only=site.name)
                block.tensors[f"{left_out}.weight"] = kept
                return online

            assert (run.block(1, run.captured.hidden, change) - before).abs().max() > 1e-4, (site.name, left_out)


@pytest.mark.parametrize("name", TINY)
def test_sites_found(name: str, tiny: Callable[..., Path]) -> None:
    skeleton, _ = skeleton_of(tiny(name))
    assert {site.name for site in skeleton.sites(1)} == SITES.get(name, GATED)
    held_by_nothing = {site.name for site in skeleton.sites(1) if site.kind == "none"}
    assert held_by_nothing == ({"attention.input", "mlp.input"} if "bert" in name else set())
    assert all(f"{site} cannot be folded: the residual reads" in skeleton.limits for site in held_by_nothing)
    assert bool(skeleton.limits) == bool(held_by_nothing)


def assert_shared(run: Run) -> None:
    """Consumers of a site read one signal, so that what stays online can be done once for all of them."""
    seen: dict[str, Tensor] = {}
    run.block(1, run.captured.hidden, keep, lambda path, *x: seen.update({path: x[0]} if x else {}))
    for site in run.skeleton.sites(1):
        inputs = [seen[consumer] for consumer in site.consumers if consumer in seen]  # merged experts are no modules
        assert all(torch.equal(x, inputs[0]) for x in inputs), site.name


@pytest.mark.parametrize("name", TINY)
def test_consumers_share_their_input(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    assert_shared(Run(tmp_path))


def test_every_table_has_a_tiny_model(tiny: Callable[..., Path]) -> None:
    assert {skeleton_of(tiny(name))[0].class_name for name in TINY} == set(ARCHITECTURES)


def test_consumers_of_a_mixture(tiny: Callable[..., Path]) -> None:
    """The router and the shared expert's gate read the norm, too; a dense layer of the same model has neither."""
    skeleton, _ = skeleton_of(tiny("qwen2_moe"))
    (dense,) = (site for site in skeleton.sites(0) if site.name == "mlp.input")
    (sparse,) = (site for site in skeleton.sites(1) if site.name == "mlp.input")
    assert dense.consumers == ("mlp.gate_proj", "mlp.up_proj")
    shared = {"mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}
    assert set(sparse.consumers) == shared | {f"mlp.experts.{e}.{p}_proj" for e in range(6) for p in ("gate", "up")}


@pytest.mark.parametrize(
    ("name", "changes", "lost", "why"),
    [
        ("opt", {"do_layer_norm_before": False}, {"attention.input", "mlp.input"}, "behind the residual"),
        ("opt", {"layer_norm_elementwise_affine": False}, {"attention.input", "mlp.input"}, "no weight"),
        ("opt", {"activation_function": "gelu"}, {"mlp.hidden"}, "ReLU"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, {"attention.input", "mlp.input"}, "residual"),
    ],
)
def test_conditions(name: str, changes: dict[str, Any], lost: set[str], why: str, tmp_path: Path) -> None:
    """What a configuration rules out cannot be folded; the rest stays exact, and the reason can be read."""
    save_tiny(name, tmp_path, **changes)
    run = Run(tmp_path)
    sites = run.skeleton.sites(1)
    assert {site.name for site in sites if site.kind != "none"} == SITES[name] - lost
    assert {site.name for site in sites if site.kind == "none"} == lost - {"mlp.hidden"}
    assert why in run.skeleton.limits
    assert_exact(run)
    assert_shared(run)


def test_sequential_residual_of_gpt_neox(tmp_path: Path) -> None:
    save_tiny("gpt_neox", tmp_path, use_parallel_residual=False)
    assert_exact(Run(tmp_path))
