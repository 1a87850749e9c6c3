"""Everything that can be folded, at once and on every architecture: the logits stay, and 1, 0 and I change no bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import Folded, Online, normal, signal_width
from tiny_models import TINY, save_tiny
from torch import Tensor

from quantkit.models.block import Block
from quantkit.transforms import fold

Tiny = Callable[..., Path]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TINY),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"do_layer_norm_before": False, "layer_norm_elementwise_affine": False}),
    ("opt", {"enable_bias": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
]
"""Tiny model, changes to its configuration."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def fold_everything(model: Folded, block: Block) -> Online:
    """A random change of every kind at every place that takes it; what the caller of the folds has to do online."""
    online: Online = {}
    linears = {info.name for info in block.linears}
    for number, site in enumerate(block.sites):
        width, seed = signal_width(block, site), 100 * block.index + 10 * number
        t = fold.apply_scale(block, site, model.factor(width, seed, norm=site.kind == "norm"), linears)
        z = torch.zeros(width, dtype=torch.float64)
        if fold.shift_obstacle(block, site) is None:
            z = fold.apply_shift(block, site, 3 * normal(width, seed=seed + 1))
        if site.kind == "none":
            online |= {block.prefix + consumer: (t, -z) for consumer in site.consumers}
        if site.head_dim:
            heads = width // site.head_dim
            matrix = torch.eye(site.head_dim) + 0.2 * normal(heads, site.head_dim, site.head_dim, seed=seed + 2)
            fold.apply_matrix(block, site, matrix)
    assert block.query_key is not None
    t = model.factor(block.query_key.width, 7 + block.index, norm=block.query_key.kind == "norm")
    fold.apply_qk_scale(block, block.query_key, t)
    return online


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_the_function_stays(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(name, tmp_path, **changes)
    model = Folded(tmp_path)
    before = model.logits(model.blocks())
    blocks, online = model.blocks(), Online()
    for block in blocks:
        online |= fold_everything(model, block)
    assert relative(model.logits(blocks, online), before) < 1e-10
    assert not online or relative(model.logits(blocks), before) > 1e-3  # what is left to the caller is needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_changes_by_nothing_change_no_bit(name: str, dtype: torch.dtype, tiny: Tiny) -> None:
    model = Folded(tiny(name, dtype))
    block, before = (model.skeleton.read_block(1, model.checkpoint) for _ in range(2))
    for site in block.sites:
        width = signal_width(block, site)
        assert torch.equal(fold.apply_scale(block, site, torch.ones(width), set()), torch.ones(width).double())
        if fold.shift_obstacle(block, site) is None:
            assert not fold.apply_shift(block, site, torch.zeros(width)).any()
        if site.head_dim:
            fold.apply_matrix(block, site, torch.eye(site.head_dim))
    assert block.query_key is not None
    fold.apply_qk_scale(block, block.query_key, torch.ones(block.query_key.width))
    for key, tensor in before.tensors.items():
        assert torch.equal(block.tensors[key], tensor), key


# --- where a shift goes ----------------------------------------------------------------------------------------------

NORMS = {"attention.input", "mlp.input"}
SHIFTS = {name: {"attention.value"} | NORMS for name in ("opt", "bloom", "gpt_neox", "bert", "bert_classifier")}
SHIFTS["llama"] = {"attention.value"}  # its tiny model has biases in attention
"""Tiny model -> sites of a block that take a shift; none of the others do."""


@pytest.mark.parametrize("name", TINY)
def test_sites_that_take_a_shift(name: str, tiny: Tiny) -> None:
    model = Folded(tiny(name))
    block, before = model.block(1), model.block(1)
    refused = {site.name: fold.shift_obstacle(block, site) for site in block.sites}
    assert {site for site, obstacle in refused.items() if obstacle is None} == SHIFTS.get(name, set())
    for site in block.sites:
        if refused[site.name]:
            with pytest.raises(ValueError, match=r"no shift can be folded at \S+: \S+"):
                fold.apply_shift(block, site, torch.ones(signal_width(block, site)))
    assert all(torch.equal(block.tensors[key], tensor) for key, tensor in before.tensors.items())


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("qwen2", "attention.input", "input_layernorm has no bias"),
        ("qwen2", "attention.value", "self_attn.o_proj has no bias"),
        ("mistral", "attention.value", "self_attn.v_proj has no bias"),
        ("qwen2", "mlp.hidden", "mlp.up_proj does not pass the activation or product behind it"),
        ("opt", "mlp.hidden", "fc1 does not pass the activation or product behind it"),
    ],
)
def test_obstacles_are_named(name: str, site: str, why: str, tiny: Tiny) -> None:
    block = Folded(tiny(name)).block(0)
    (found,) = (each for each in block.sites if each.name == site)
    assert str(fold.shift_obstacle(block, found)).endswith(why)


def test_every_consumer_needs_a_bias(tiny: Tiny) -> None:
    """Also one that is never quantised, and where nothing but the consumers is rewritten."""
    block = Folded(tiny("bert")).block(0)
    del block.tensors["attention.self.key.bias"]
    assert fold.shift_obstacle(block, block.sites[0]) == "attention.self.key has no bias"


# --- queries and keys ------------------------------------------------------------------------------------------------

WIDTHS = {
    "llama": 2 * 8, "mistral": 1 * 12, "qwen2": 2 * 8, "qwen3": 16, "gemma2": 2 * 4, "gemma3": 12, "phi3": 2 * 8,
    "opt": 64, "bloom": 64, "gpt_neox": 4 * (4 + 8), "mixtral": 2 * 8, "qwen2_moe": 2 * 8, "qwen3_moe": 16,
    "bert": 64, "bert_classifier": 64,
}  # fmt: skip
"""kv heads times (rotated pairs + other channels); without kv heads behind a norm."""


@pytest.mark.parametrize("name", TINY)
def test_free_values_of_queries_and_keys(name: str, tiny: Tiny) -> None:
    block = Folded(tiny(name)).block(0)
    pair = block.query_key
    assert pair is not None
    assert pair.width == WIDTHS[name]
    assert pair.tie.unique().tolist() == list(range(pair.width))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt_neox", "qwen2_moe"])
def test_the_tie_is_needed(name: str, tiny: Tiny) -> None:
    """With a value per channel, rotated pairs apart, the scores change: more freedom than ``width`` there is not."""
    model = Folded(tiny(name))
    before, block = model.logits(model.blocks()), model.block(0)
    pair = block.query_key
    assert pair is not None
    loose = replace(pair, tie=torch.arange(len(pair.tie)))
    fold.apply_qk_scale(block, loose, model.factor(loose.width, 3))
    assert relative(model.logits([block, model.block(1)]), before) > 1e-4


@pytest.mark.parametrize("name", TINY)
def test_queries_are_multiplied_and_keys_divided(name: str, tiny: Tiny) -> None:
    model = Folded(tiny(name))
    block, before = model.block(0), model.block(0)
    pair = block.query_key
    assert pair is not None
    t = normal(pair.width, seed=4).exp()
    fold.apply_qk_scale(block, pair, t)

    def rows(block: Block, module: str, rows: Tensor | None) -> Tensor:
        weight = block.tensors[f"{module}.weight"] + pair.norm_offset
        return (weight if rows is None else weight[rows]).reshape(-1, pair.head_dim, weight[0].numel())

    keys = t[pair.tie].view(-1, pair.head_dim, 1)
    key_ratio = rows(block, pair.key, pair.key_rows) / rows(before, pair.key, pair.key_rows)
    torch.testing.assert_close(key_ratio, (1 / keys).expand_as(key_ratio), rtol=1e-9, atol=0)
    query_ratio = rows(block, pair.query, pair.query_rows) / rows(before, pair.query, pair.query_rows)
    queries = keys.repeat_interleave(pair.repeats, dim=0)  # the query heads of a key head follow one another
    torch.testing.assert_close(query_ratio, queries.expand_as(query_ratio), rtol=1e-9, atol=0)
    changed = {key for key, tensor in block.tensors.items() if not torch.equal(tensor, before.tensors[key])}
    weights = {f"{module}.weight" for module in (pair.query, pair.key)}
    assert weights <= changed <= weights | {f"{module}.bias" for module in (pair.query, pair.key)}


def test_no_pair_without_a_table(tmp_path: Path) -> None:
    from tiny_models import make_tiny
    from transformers import Olmo2Config

    shape: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    make_tiny(Olmo2Config(**shape, intermediate_size=96, pad_token_id=0)).save_pretrained(tmp_path)
    assert Folded(tmp_path).block(0).query_key is None
