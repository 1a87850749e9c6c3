"""A fold must leave the function of a block as it is: every architecture, every site, dtype rounding included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TINY
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.models.block import Block, LinearInfo, Site
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.transforms import fold

Tiny = Callable[..., Path]
IDS = torch.arange(24).view(2, 12) * 7 % 199


def factor(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def open_model(folder: Path) -> tuple[Skeleton, Checkpoint]:
    checkpoint, config = Checkpoint.open(folder), load_config(folder)
    config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    return Skeleton(config, checkpoint), checkpoint


def read_double(skeleton: Skeleton, index: int, checkpoint: Checkpoint) -> Block:
    """A block whose working copies and stored tensors are float64, so that only the algebra is tested.

    Gemma's norms compute in float32 whatever the model's dtype: multiples of 1/256 come through that exactly.
    """
    block = skeleton.read_block(index, checkpoint)
    block.tensors = {name: tensor.double() for name, tensor in block.tensors.items()}
    for site in block.sites:
        if site.norm_offset:
            block.tensors[f"{site.producer}.weight"].mul_(256).round_().div_(256)
    block.stored_dtypes = dict.fromkeys(block.tensors, torch.float64)
    return block


def some_factor(block: Block, site: Site, seed: int) -> Tensor:
    """One t for ``site``; powers of two where the norm computes in float32."""
    t = factor(block.weight(site.consumers[0]).shape[1] // site.repeats, seed)
    return t.log2().round().exp2() if site.norm_offset else t


def logits(folder: Path, skeleton: Skeleton, blocks: list[Block]) -> Tensor:
    """Of the float64 model with its blocks replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    module_list = model.get_submodule(skeleton.blocks_path)
    for block in blocks:
        module_list[block.index] = skeleton.build_block(block.index, block.tensors, torch.float64)
    with torch.inference_mode():
        result: Tensor = model(IDS, use_cache=False).logits
    return result


@pytest.mark.parametrize("name", TINY)
def test_every_site_of_every_architecture_keeps_the_logits(name: str, tiny: Tiny) -> None:
    folder = tiny(name)
    skeleton, checkpoint = open_model(folder)
    before = logits(folder, skeleton, [read_double(skeleton, i, checkpoint) for i in range(skeleton.num_blocks)])
    blocks = [read_double(skeleton, i, checkpoint) for i in range(skeleton.num_blocks)]
    for block in blocks:
        assert block.sites
        for number, site in enumerate(block.sites):
            t = some_factor(block, site, number)
            applied = fold.apply_scale(block, site, t, {info.name for info in block.linears})
            torch.testing.assert_close(applied, t, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits(folder, skeleton, blocks), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_every_site_changes_producer_and_consumers(name: str, tiny: Tiny) -> None:
    """Guards the test above: a fold that does nothing would pass it."""
    skeleton, checkpoint = open_model(tiny(name))
    for number in range(len(skeleton.sites(0))):
        block, untouched = read_double(skeleton, 0, checkpoint), read_double(skeleton, 0, checkpoint)
        site = block.sites[number]
        fold.apply_scale(block, site, some_factor(block, site, number), set())
        changed = {key for key, tensor in block.tensors.items() if not torch.equal(tensor, untouched.tensors[key])}
        expected = {f"{module}.weight" for module in (site.producer, *site.consumers)}
        assert changed - {f"{site.producer}.bias"} == expected


def norm_block(gain: Tensor, bias: Tensor | None, dtype: torch.dtype, offset: float = 0.0) -> Block:
    """One norm that feeds two linears; ``gain`` is what it multiplies by, as far as ``dtype`` can hold it."""
    width = gain.numel()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "norm.weight": (gain - offset).to(dtype).float(),
        "a.weight": torch.randn(5, width, generator=generator),
        "b.weight": torch.randn(3, width, generator=generator),
    }
    if bias is not None:
        tensors["norm.bias"] = bias.to(dtype).float()
    linears = (LinearInfo("a", 5, width, False), LinearInfo("b", 3, width, False))
    site = Site("x", "norm", "norm", ("a", "b"), norm_offset=offset)
    return Block(0, "layers.0.", tensors, dict.fromkeys(tensors, dtype), linears, (site,))


def products(block: Block) -> Tensor:
    """[8, width]: gain times the consumers' columns, what a fold must not change."""
    (site,) = block.sites
    gain = block.tensors["norm.weight"].double() + site.norm_offset
    return gain * torch.cat([block.weight("a"), block.weight("b")]).double()


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["plain", "one_plus_weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounded_norms_stay_exact_however_often_they_are_folded(dtype: torch.dtype, offset: float) -> None:
    block = norm_block(1 + 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(0)).abs(), None, dtype, offset)
    before = products(block)
    for step in range(20):
        t = factor(64, step // 2)
        t = t if step % 2 == 0 else t.reciprocal()
        fold.apply_scale(block, block.sites[0], t, {"a", "b"})
        weight = block.tensors["norm.weight"]
        assert torch.equal(weight, weight.to(dtype).float())  # storing it loses nothing
    torch.testing.assert_close(products(block), before, rtol=20 * 2**-23, atol=0)


def test_the_factor_returned_is_the_one_applied() -> None:
    block = norm_block(torch.rand(64) + 0.5, None, torch.bfloat16)
    gain, columns = block.tensors["norm.weight"].double(), block.weight("a").clone()
    t = factor(64, 3)
    applied = fold.apply_scale(block, block.sites[0], t, {"a", "b"})
    torch.testing.assert_close(gain * applied, block.tensors["norm.weight"].double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(columns.double() / applied, block.weight("a").double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(applied, t, rtol=2**-8, atol=0)
    assert not torch.equal(applied, t)


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["plain", "one_plus_weight"])
def test_channels_that_a_norm_silences_are_left_alone(offset: float) -> None:
    gain = torch.ones(8)
    gain[2] = 0
    block = norm_block(gain, torch.ones(8), torch.bfloat16, offset)
    before = products(block)
    applied = fold.apply_scale(block, block.sites[0], torch.full((8,), 3.0), {"a", "b"})
    assert applied[2] == 1
    assert bool((applied[[0, 1, 3, 4, 5, 6, 7]] != 1).all())
    torch.testing.assert_close(products(block), before, rtol=1e-6, atol=0)
    torch.testing.assert_close(block.tensors["norm.bias"].double(), applied, rtol=1e-7, atol=0)


def test_a_channel_that_would_be_rounded_to_zero_is_left_alone() -> None:
    block = norm_block(torch.tensor([1.0, 1.0]), None, torch.float16)
    applied = fold.apply_scale(block, block.sites[0], torch.tensor([1e-9, 2.0]), {"a", "b"})
    assert applied.tolist() == [1.0, 2.0]
    offset = norm_block(torch.tensor([1.0, 1.0]), None, torch.bfloat16, offset=1.0)
    applied = fold.apply_scale(offset, offset.sites[0], torch.tensor([1e-4, 2.0]), {"a", "b"})
    assert applied.tolist() == [1.0, 2.0]  # 1e-4 - 1 is -1 in bfloat16


def linear_block(dtype: torch.dtype) -> Block:
    """v -> o with 2 key/value heads of 3 channels, each read by 2 query heads; v is the end of a fused projection."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "qkv.weight": torch.randn(10, 4, generator=generator).to(dtype).float(),
        "qkv.bias": torch.randn(10, generator=generator).to(dtype).float(),
        "o.weight": torch.randn(4, 12, generator=generator),
    }
    linears = (LinearInfo("qkv", 10, 4, True), LinearInfo("o", 4, 12, False))
    site = Site("value", "linear", "qkv", ("o",), rows=torch.arange(4, 10), repeats=2, head_dim=3)
    return Block(0, "layers.0.", tensors, dict.fromkeys(tensors, dtype), linears, (site,))


def heads_out(block: Block) -> Tensor:
    """[4, 12, 5]: o's columns times the rows (weight and bias) that reach each of them; heads repeat one by one."""
    value = torch.cat([block.weight("qkv"), block.tensors["qkv.bias"][:, None]], dim=1)[4:].double()
    read = [head * 3 + channel for head in (0, 0, 1, 1) for channel in range(3)]
    return block.weight("o").double()[:, :, None] * value[read]


def test_rows_of_a_fused_producer_with_grouped_heads() -> None:
    block = linear_block(torch.bfloat16)
    before, qk = heads_out(block), block.weight("qkv")[:4].clone()
    applied = fold.apply_scale(block, block.sites[0], factor(6, 0), {"qkv", "o"})
    torch.testing.assert_close(applied, factor(6, 0), rtol=0, atol=0)  # rounded later, by the quantiser
    torch.testing.assert_close(heads_out(block), before, rtol=1e-6, atol=0)
    assert torch.equal(block.weight("qkv")[:4], qk)


def test_a_producer_left_in_full_precision_is_rounded_before_the_consumers_follow() -> None:
    block = linear_block(torch.bfloat16)
    before = heads_out(block)
    for step in range(10):
        t = factor(6, step // 2)
        fold.apply_scale(block, block.sites[0], t if step % 2 == 0 else t.reciprocal(), {"o"})
        rows = block.weight("qkv")
        assert torch.equal(rows, rows.bfloat16().float())
    after = heads_out(block)
    drift = (after * before).sum((0, 2)) / before.square().sum((0, 2)) - 1
    assert float(drift.abs().max()) < 0.003  # one bfloat16 rounding is 0.004
    # each fold rounds every weight once: errors of 2**-9 that add up like a random walk
    assert float((after - before).norm() / before.norm()) < 2**-9 * 10**0.5


def test_columns_are_divided_in_chunks_in_place() -> None:
    weight = torch.randn(70, 30)
    expected = weight.double() / factor(30, 5)
    kept = weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.quantizers.grid.CHUNK_ELEMENTS", 100)
        fold.divide_columns(weight, factor(30, 5))
    assert kept is weight
    torch.testing.assert_close(weight.double(), expected, rtol=2**-23, atol=0)
