"""A fold must leave the function of a block as it is: every architecture, every site, dtype rounding included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folded import Folded, Online, normal, signal_width
from tiny_models import TINY
from torch import Tensor

from quantkit.models.block import Block, LinearInfo, QueryKey, Site
from quantkit.transforms import fold

Tiny = Callable[..., Path]


def factor(width: int, seed: int) -> Tensor:
    return normal(width, seed=seed).exp()


@pytest.mark.parametrize("name", TINY)
def test_every_site_of_every_architecture_keeps_the_logits(name: str, tiny: Tiny) -> None:
    model = Folded(tiny(name))
    before = model.logits(model.blocks())
    blocks, online = model.blocks(), Online()
    for block in blocks:
        assert block.sites
        for number, site in enumerate(block.sites):
            t = model.factor(signal_width(block, site), number, norm=site.kind == "norm")
            applied = fold.apply_scale(block, site, t, {info.name for info in block.linears})
            torch.testing.assert_close(applied, t, rtol=1e-12, atol=0)
            if site.kind == "none":
                online |= {block.prefix + consumer: (t, torch.zeros(())) for consumer in site.consumers}
    torch.testing.assert_close(model.logits(blocks, online), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_every_site_changes_producer_and_consumers(name: str, tiny: Tiny) -> None:
    """Guards the test above: a fold that does nothing would pass it."""
    model = Folded(tiny(name))
    for number in range(len(model.skeleton.sites(0))):
        block, untouched = model.block(0), model.block(0)
        site = block.sites[number]
        fold.apply_scale(block, site, model.factor(signal_width(block, site), number, norm=site.kind == "norm"), set())
        changed = {key for key, tensor in block.tensors.items() if not torch.equal(tensor, untouched.tensors[key])}
        producer = () if site.kind == "none" else (site.producer,)
        assert changed - {f"{site.producer}.bias"} == {f"{module}.weight" for module in (*producer, *site.consumers)}


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


# --- shifts of a norm ------------------------------------------------------------------------------------------------


def with_biases(block: Block) -> Block:
    """``norm_block`` with biases in its consumers, large beside those of the norm."""
    biases = {"a.bias": 9 * factor(5, 11).float(), "b.bias": -9 * factor(3, 12).float()}
    block.tensors |= biases
    block.stored_dtypes |= dict.fromkeys(biases, block.stored_dtypes["norm.weight"])
    return block


def constants(block: Block) -> Tensor:
    """[8]: what the consumers put out where the normalised input is 0."""
    weight = torch.cat([block.weight("a"), block.weight("b")]).double()
    bias = torch.cat([block.tensors["a.bias"], block.tensors["b.bias"]]).double()
    return weight @ block.tensors["norm.bias"].double() + bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounded_shifts_stay_exact_however_often_they_are_folded(dtype: torch.dtype) -> None:
    block = with_biases(norm_block(torch.rand(64) + 0.5, torch.randn(64), dtype))
    before = constants(block)
    for step in range(20):
        z = normal(64, seed=step)
        stored = block.tensors["norm.bias"].clone().double()
        applied = fold.apply_shift(block, block.sites[0], z)
        bias = block.tensors["norm.bias"]
        assert torch.equal(bias, bias.to(dtype).float())  # storing it loses nothing
        assert torch.equal(applied, stored - bias.double())
        torch.testing.assert_close(applied, z, rtol=0, atol=20 * torch.finfo(dtype).eps)
        assert not torch.equal(applied, z)
    torch.testing.assert_close(constants(block), before, rtol=0, atol=20 * 2**-24 * 100)


def test_a_shift_after_a_scale_makes_up_for_the_rounding_of_both() -> None:
    block = with_biases(norm_block(torch.rand(64) + 0.5, 100 * torch.randn(64), torch.bfloat16))
    before, (site,) = constants(block), block.sites
    applied = fold.apply_scale(block, site, factor(64, 3), {"a", "b"})
    lost = block.tensors["norm.bias"] - block.tensors["norm.bias"].bfloat16().float()
    assert lost.abs().max() > 0.1
    fold.apply_shift(block, site, applied)
    assert torch.equal(block.tensors["norm.bias"], block.tensors["norm.bias"].bfloat16().float())
    torch.testing.assert_close(constants(block), before, rtol=1e-5, atol=1e-4)


def test_shifts_are_in_units_of_the_signal_as_it_is() -> None:
    """z before a scale of t is z * t behind it."""
    one, other = (with_biases(norm_block(torch.ones(8), torch.randn(8), torch.float32)) for _ in range(2))
    t, z = torch.full((8,), 4.0), normal(8, seed=1)
    other.tensors["norm.bias"] = one.tensors["norm.bias"].clone()
    fold.apply_shift(one, one.sites[0], z)
    fold.apply_scale(one, one.sites[0], t, {"a", "b"})
    fold.apply_scale(other, other.sites[0], t, {"a", "b"})
    fold.apply_shift(other, other.sites[0], z * t)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_router_without_a_bias_is_in_the_way() -> None:
    block = with_biases(norm_block(torch.ones(8), torch.ones(8), torch.float32))
    assert fold.shift_obstacle(block, block.sites[0]) is None
    del block.tensors["b.bias"]
    assert fold.shift_obstacle(block, block.sites[0]) == "b has no bias"


# --- v -> o ----------------------------------------------------------------------------------------------------------


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


def test_a_shift_of_grouped_heads() -> None:
    """Every query head of a key/value head has to make up for the same shift."""
    block = linear_block(torch.bfloat16)
    block.tensors["o.bias"] = torch.ones(4)
    block.stored_dtypes["o.bias"] = torch.bfloat16
    value, z = block.tensors["qkv.bias"].clone().double(), 5 * normal(6, seed=0)
    applied = fold.apply_shift(block, block.sites[0], z)
    torch.testing.assert_close(applied, z, rtol=0, atol=2**-5)  # half a step of bfloat16 at 8 to 16
    bias = block.tensors["qkv.bias"]
    assert torch.equal(bias, bias.bfloat16().float())
    assert torch.equal(bias[:4].double(), value[:4])  # queries and keys
    assert torch.equal(applied, value[4:] - bias[4:].double())
    read = [head * 3 + channel for head in (0, 0, 1, 1) for channel in range(3)]
    expected = 1 + block.weight("o").double() @ applied[read]
    torch.testing.assert_close(block.tensors["o.bias"].double(), expected, rtol=1e-6, atol=0)


def per_head(block: Block) -> Tensor:
    """[4 query heads, 4, 5]: what each query head makes of the input, bias last."""
    return heads_out(block).unflatten(1, (4, 3)).sum(2).movedim(1, 0)


@pytest.mark.parametrize("chunk", [5, 1 << 18], ids=["chunks", "whole"])
def test_a_matrix_per_key_head(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.quantizers.grid.CHUNK_ELEMENTS", chunk)
    block = linear_block(torch.float32)
    before, value, qk = per_head(block), block.weight("qkv").clone()[4:].double(), block.weight("qkv")[:4].clone()
    bias = block.tensors["qkv.bias"].clone()[4:].double()
    matrix = torch.eye(3) + 0.3 * normal(2, 3, 3, seed=8)
    fold.apply_matrix(block, block.sites[0], matrix)
    torch.testing.assert_close(per_head(block), before, rtol=0, atol=1e-5)
    for head in range(2):
        rows = slice(3 * head, 3 * head + 3)
        signal = (value[rows].T @ matrix[head]).T  # a row vector of the head's channels times the matrix
        torch.testing.assert_close(block.weight("qkv")[4:][rows].double(), signal, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            block.tensors["qkv.bias"][4:][rows].double(), bias[rows] @ matrix[head], rtol=1e-6, atol=1e-6
        )
    assert torch.equal(block.weight("qkv")[:4], qk)


def test_one_matrix_for_all_heads() -> None:
    one, each = linear_block(torch.float32), linear_block(torch.float32)
    matrix = torch.eye(3) + 0.3 * normal(3, 3, seed=8)
    fold.apply_matrix(one, one.sites[0], matrix)
    fold.apply_matrix(each, each.sites[0], matrix.expand(2, 3, 3))
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in each.tensors.items())


def test_matrices_that_cannot_be_folded() -> None:
    block, before = linear_block(torch.float32), linear_block(torch.float32)
    with pytest.raises(ValueError, match=r"value takes a matrix \[2, 3, 3\] or one for all heads, got \[4, 3, 3\]"):
        fold.apply_matrix(block, block.sites[0], torch.eye(3).expand(4, 3, 3))
    with pytest.raises(torch.linalg.LinAlgError, match="value: the matrix of head 1 is singular"):
        fold.apply_matrix(block, block.sites[0], torch.stack([torch.eye(3), torch.zeros(3, 3)]))
    assert all(torch.equal(block.tensors[name], tensor) for name, tensor in before.tensors.items())
    norm = norm_block(torch.ones(8), None, torch.float32)
    with pytest.raises(ValueError, match="only v -> o sites take a matrix, x is none"):
        fold.apply_matrix(norm, norm.sites[0], torch.eye(8))


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_norm_of_queries_with_an_offset() -> None:
    """Gemma 3: (1 + weight) is what t multiplies; t = 1 keeps weights that 1 + weight would round."""
    weight = torch.tensor([1e-12, -0.25, 0.5, 3.0])
    tensors = {"q.weight": weight.clone(), "k.weight": weight.clone()}
    block = Block(0, "layers.0.", tensors, dict.fromkeys(tensors, torch.float32), (), ())
    pair = QueryKey("norm", "q", "k", torch.tensor([0, 1, 0, 1]), 4, norm_offset=1.0)
    fold.apply_qk_scale(block, pair, torch.ones(2))
    assert torch.equal(tensors["q.weight"], weight)
    assert torch.equal(tensors["k.weight"], weight)
    fold.apply_qk_scale(block, pair, torch.tensor([2.0, 3.0]))
    ratios = (1 + tensors["q.weight"]) / (1 + weight), (1 + weight) / (1 + tensors["k.weight"])
    for ratio in ratios:
        torch.testing.assert_close(ratio, torch.tensor([2.0, 3.0, 2.0, 3.0]))


def test_columns_are_divided_in_chunks_in_place() -> None:
    weight = torch.randn(70, 30)
    expected = weight.double() / factor(30, 5)
    kept = weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.quantizers.grid.CHUNK_ELEMENTS", 100)
        fold.divide_columns(weight, factor(30, 5))
    assert kept is weight
    torch.testing.assert_close(weight.double(), expected, rtol=2**-23, atol=0)
