"""Whole models on this machine's kernels: logits, saving, moving, and what is in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import assert_saved_as_loaded, layer_format, load_plain, logits, quantise
from torch import nn

import quantkit
from quantkit.kernels import dispatch
from quantkit.kernels.cpu import int4
from quantkit.layers.quant_linear import QuantLinear

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(
        int4._block() is None or not torch.cpu._is_vnni_supported(), reason="this processor runs the reference only"
    ),
]
Tiny = Callable[..., Path]


def linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def tensors_of(packed: Any) -> Iterator[torch.Tensor]:
    if isinstance(packed, torch.Tensor):
        yield packed
    elif isinstance(packed, tuple):
        for part in packed:
            yield from tensors_of(part)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("scheme", ["W4A16G32", "W4ZA16G32", "W3ZA16G32", "W8A16", "W8A8", "W8A8TS"])
def test_logits_and_what_is_saved(tiny: Tiny, tmp_path: Path, name: str, scheme: str) -> None:
    quantise(tiny(name, torch.bfloat16), tmp_path / "packed", lambda _: layer_format(scheme), "native")
    model, _ = quantkit.load(tmp_path / "packed")
    kept = [layer for layer in linears(model) if layer.runtime is None or layer.runtime.layout is None]
    assert not kept  # packed while loading
    with dispatch.only_reference():
        want = logits(model)
    found = logits(model)
    # Of most tokens: a mixture sends one to another expert where two are rounded to about the same weight.
    assert ((found - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.03
    assert_saved_as_loaded(model, tmp_path / "packed", tmp_path / "saved")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), found)  # packed again at its first call
    assert torch.equal(logits(load_plain(tmp_path / "saved")), found)


def test_a_model_that_changes_its_dtype(tiny: Tiny, tmp_path: Path) -> None:
    quantise(tiny("llama", torch.bfloat16), tmp_path / "packed", lambda _: layer_format("W4ZA16G32"), "native")
    model, _ = quantkit.load(tmp_path / "packed")
    nn.Module.float(model)  # transformers' own refuses
    assert {dispatch.choose(torch.ones(1, layer.in_features), layer).name for layer in linears(model)} == {"reference"}
    plain, _ = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(logits(model), logits(plain))


def test_four_bit_codes_are_held_once(tiny: Tiny, tmp_path: Path) -> None:
    """All of a layer's tensors together stay under a third of bfloat16's 2 bytes per weight."""
    source = tiny("llama", torch.bfloat16)
    quantise(source, tmp_path / "packed", lambda _: layer_format("W4A16G64"), "native")
    model, _ = quantkit.load(tmp_path / "packed")
    layer = QuantLinear(512, 512, False, layer_format("W4A16G128"), torch.bfloat16)
    for part in layer.state_dict().values():
        part.zero_()
    for held in (*linears(model)[:1], layer):
        runtime = dispatch.prepare(held)
        assert held._buffers["weight_packed"] is None
        tensors = [*tensors_of(runtime.packed), *(part for part in held._buffers.values() if part is not None)]
        weights = -(-held.out_features // 64) * 64 * held.in_features  # rows of tiny layers are filled up
        assert sum(tensor.nbytes for tensor in tensors) < 2 / 3 * weights
