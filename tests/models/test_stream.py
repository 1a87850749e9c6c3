"""Block by block equals the whole model: the reference is a plain ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, VOCABULARY, load_tiny, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig, Olmo2Config, OlmoeConfig, PreTrainedConfig

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.models.stream import BlockStream

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Relative to the largest logit. Mostly the two are equal; kernels round by memory alignment."""


def batch(padded: bool) -> tuple[Tensor, Tensor | None]:
    """ids [3, 11] and, if ``padded``, a mask with left padding of 0, 4 and 9."""
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
    if not padded:
        return ids, None
    mask = (torch.arange(11) >= torch.tensor([[0], [4], [9]])).long()
    return ids * mask, mask


def streamed(folder: Path, dtype: torch.dtype, ids: Tensor, mask: Tensor | None) -> Tensor:
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(load_config(folder), checkpoint)
    skeleton.check(checkpoint)
    stream = BlockStream(skeleton, checkpoint, dtype)
    captured = stream.capture(ids, mask)
    hidden = captured.hidden
    for index in range(skeleton.num_blocks):
        block = skeleton.read_block(index, checkpoint)
        module = skeleton.build_block(index, block.tensors, dtype)
        hidden = stream.run_block(module, hidden, index, captured)
    return stream.logits(hidden, captured)


@torch.no_grad()
def whole(folder: Path, dtype: torch.dtype, ids: Tensor, mask: Tensor | None) -> Tensor:
    model = load_tiny(folder, dtype=dtype).eval()
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def assert_same(folder: Path, dtype: torch.dtype, padded: bool) -> None:
    ids, mask = batch(padded)
    expected = whole(folder, dtype, ids, mask)
    found = streamed(folder, dtype, ids, mask)
    assert found.dtype == dtype
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_equals_the_whole_model(name: str, dtype: torch.dtype, padded: bool, tiny: Callable[..., Path]) -> None:
    assert_same(tiny(name, dtype), dtype, padded)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
UNKNOWN = {
    "olmo2": Olmo2Config(**SMALL, intermediate_size=96, num_key_value_heads=2, pad_token_id=0),
    "olmoe": OlmoeConfig(**SMALL, intermediate_size=40, num_experts=4, num_experts_per_tok=2, pad_token_id=0),
    "falcon": FalconConfig(**SMALL, alibi=True),
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("config", UNKNOWN.values(), ids=UNKNOWN)
def test_architectures_without_a_table(config: PreTrainedConfig, padded: bool, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_same(tmp_path, torch.float32, padded)


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_one_block(name: str, tmp_path: Path) -> None:
    """Too few blocks to see from the calls whether they return tuples."""
    save_tiny(name, tmp_path, num_hidden_layers=1)
    assert_same(tmp_path, torch.float32, padded=True)


def test_rotary_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    save_tiny("llama", tmp_path, rope_parameters=rope)
    assert_same(tmp_path, torch.float32, padded=False)


def test_stored_narrower_than_computed(tiny: Callable[..., Path]) -> None:
    """A bf16 checkpoint streamed in float32 is the model loaded in float32."""
    ids, _ = batch(padded=False)
    folder = tiny("gemma3", torch.bfloat16)
    found, expected = streamed(folder, torch.float32, ids, None), whole(folder, torch.float32, ids, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_blocks_are_called_as_the_model_does(tiny: Callable[..., Path]) -> None:
    """Gemma 3 alternates: sliding and full layers get their own mask and rotary table."""
    folder = tiny("gemma3")
    checkpoint = Checkpoint.open(folder)
    stream = BlockStream(Skeleton(load_config(folder), checkpoint), checkpoint, torch.float32)
    captured = stream.capture(batch(padded=False)[0])
    (_, sliding), (_, full) = captured.calls
    assert captured.hidden.shape == (3, 11, 64)
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])
    assert sliding["attention_mask"] is not None
    assert full["attention_mask"] is None
    assert sliding["past_key_values"] is None


def test_reads_only_what_runs_and_keeps_nothing(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama")
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(load_config(folder), checkpoint)
    asked: list[str] = []

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        asked.extend(names)
        return skeleton.read_tensors(names, checkpoint)

    stream = BlockStream(skeleton, read, torch.float32)
    captured = stream.capture(batch(padded=False)[0])
    assert asked == ["model.embed_tokens.weight"]
    stream.logits(captured.hidden, captured)
    assert asked[1:] == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert all(parameter.is_meta for parameter in stream._model.parameters())
