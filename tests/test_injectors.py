"""The edits must leave every model's function as it is, and must make its weights or activations hard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CAUSAL
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.eval.injectors import add_outliers, inject, spread_columns
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config

Tiny = Callable[..., Path]
IDS = torch.arange(24).view(2, 12) * 7 % 199


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        result: Tensor = model(IDS, use_cache=False).logits
    return result


def column_spread(folder: Path) -> float:
    """Largest over smallest column deviation of the first norm's first consumer."""
    checkpoint = Checkpoint.open(folder)
    block = Skeleton(load_config(folder), checkpoint).read_block(0, checkpoint)
    deviation = block.weight(block.sites[0].consumers[0]).std(dim=0)
    return float(deviation.max() / deviation.min())


def largest_signal(folder: Path) -> float:
    """What the first norm of block 0 emits at most, in units of its typical channel."""
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(load_config(folder), checkpoint)
    site = skeleton.sites(0)[0]
    seen: list[Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    norm = model.get_submodule(skeleton.block_prefix(0) + site.producer)
    norm.register_forward_hook(lambda module, args, output: seen.append(output.abs().flatten(0, -2).amax(0)))
    with torch.inference_mode():
        model(IDS, use_cache=False)
    return float(seen[0].max() / seen[0].median())


@pytest.mark.parametrize("name", CAUSAL)
def test_the_function_stays(name: str, tiny: Tiny, tmp_path: Path) -> None:
    copy = inject(tiny(name), tmp_path / "copy", [spread_columns, add_outliers], seed=3)
    before, after = logits(tiny(name)), logits(copy)
    assert float((after - before).norm() / before.norm()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "qwen2_moe"])
def test_columns_spread(name: str, tiny: Tiny, tmp_path: Path) -> None:
    assert column_spread(tiny(name)) < 3
    assert column_spread(inject(tiny(name), tmp_path / "copy", [spread_columns])) > 20


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "qwen2_moe"])
def test_activations_get_outliers(name: str, tiny: Tiny, tmp_path: Path) -> None:
    assert largest_signal(tiny(name)) < 10
    assert largest_signal(inject(tiny(name), tmp_path / "copy", [add_outliers])) > 15


def test_a_norm_with_biases_all_around_gets_an_offset(tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny("opt"))
    copy = Checkpoint.open(inject(tiny("opt"), tmp_path / "copy", [add_outliers]))
    norm = "model.decoder.layers.0.self_attn_layer_norm"
    factor = copy.read(f"{norm}.weight") / source.read(f"{norm}.weight")
    offset = copy.read(f"{norm}.bias") - source.read(f"{norm}.bias") * factor
    assert int((factor > 20).sum()) == 2  # of 64 channels
    assert (offset.abs() / 35).round().sum() == 1


def test_a_seed_decides(tiny: Tiny, tmp_path: Path) -> None:
    weights = [
        Checkpoint.open(inject(tiny("llama"), tmp_path / str(number), [spread_columns], seed=seed)).read(
            "model.layers.1.input_layernorm.weight"
        )
        for number, seed in enumerate((5, 5, 6))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
