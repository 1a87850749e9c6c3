"""A rotated residual stream leaves the function, on every architecture that allows it, and nothing less than all of
it does. Everything in float64 where algebra is tested: norms and softmaxes of transformers are kept from float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, load_tiny, save_tiny
from torch import Tensor

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.rotated import RotatedCheckpoint, rotate
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.transforms import residual
from quantkit.transforms.residual import Change, Rotation, fusion, obstacle, turn

IDS = torch.arange(24).view(2, 12) * 7 % 199
ALLOWED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ALLOWED),
    ("llama", {"tie_word_embeddings": True, "mlp_bias": True}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("opt", {"word_embed_proj_dim": 64}),
    ("opt", {"word_embed_proj_dim": 64, "tie_word_embeddings": False, "enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False}),
    ("qwen2_moe", {"tie_word_embeddings": True}),
    ("mistral", {"hidden_size": 28, "num_attention_heads": 2}),
    ("llama", {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("gpt_neox", {"hidden_size": 24}),
    ("gpt_neox", {"hidden_size": 36, "num_attention_heads": 2, "rotary_pct": 0.25}),
    ("opt", {"hidden_size": 44}),
    ("opt", {"hidden_size": 52, "word_embed_proj_dim": 52}),
    ("opt", {"hidden_size": 46, "num_attention_heads": 2}),
    ("llama", {"hidden_size": 92, "num_attention_heads": 2, "num_key_value_heads": 1}),
]
"""Tiny model, changes to its configuration; sizes with bases of Paley I and II and Hartley's."""


class Source:
    """A float64 model folder and views of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        self.config = load_config(folder)
        self.skeleton = Skeleton(self.config, self.checkpoint)

    def view(self, seed: int = 0) -> RotatedCheckpoint:
        return rotate(self.config, self.skeleton, self.checkpoint, seed)[1]


def saved(name: str, folder: Path, **changes: Any) -> Source:
    save_tiny(name, folder, torch.float64, **changes)
    return Source(folder)


def write(view: RotatedCheckpoint, folder: Path) -> Path:
    """What a run without any quantisation would leave."""
    folder.mkdir()
    config = json.loads((view.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"tie_word_embeddings": False} if view.untied else {})))
    save_file(view.read_many(view.names), folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> Tensor:
    model = load_tiny(folder, dtype=torch.float64, experts_implementation="eager").eval()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = _rms(module)
    with torch.inference_mode(), patch("torch.nn.functional.softmax", lambda x, dim=None, **_: torch.softmax(x, dim)):
        result: Tensor = model(IDS, use_cache=False).logits
    return result


def _rms(norm: Any) -> Callable[[Tensor], Tensor]:
    """What the norm does, in the dtype of its input."""
    return lambda x: norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_the_function_stays(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source", **changes)
    assert obstacle(source.skeleton, source.checkpoint) == ""
    view = source.view()
    found = logits(write(view, tmp_path / "rotated"))
    assert relative(found, logits(source.folder)) < 1e-10
    changed = {name for name in view.names if name not in source.checkpoint.names
               or not torch.equal(view.read(name), source.checkpoint.read(name))}  # fmt: skip
    assert changed == set(fusion(source.skeleton).changes)


SINGLE = ("llama", "qwen2_moe", "opt", "gpt_neox", "mixtral")


@pytest.mark.parametrize("name", SINGLE)
def test_every_change_is_needed(name: str, tmp_path: Path) -> None:
    """Leaving out any one tensor of the second block, or outside the blocks, shows in the logits."""
    source = saved(name, tmp_path / "source", word_embed_proj_dim=64, tie_word_embeddings=False)
    whole, expected = source.view(), logits(source.folder)
    turned, plain = (c.read_many(c.names) for c in (whole, source.checkpoint))
    write(whole, tmp_path / "rotated")
    experts: set[str] = set()
    for stored in fusion(source.skeleton).changes:
        kind = ".".join(part for part in stored.split(".") if not part.isdigit())
        if ".layers.0." in stored or kind in experts:
            continue
        mixed = dict(turned)
        if ".experts." in stored:  # all of a kind: one alone may not be chosen by any token
            experts.add(kind)
            ending = stored.rpartition(".experts.")[2].lstrip("0123456789")
            mixed |= {n: plain[n] for n in plain if ".layers.1." in n and ".experts." in n and n.endswith(ending)}
        save_file(mixed | {stored: plain[stored]}, tmp_path / "rotated" / "model.safetensors", {"format": "pt"})
        assert relative(logits(tmp_path / "rotated"), expected) > 1e-5, stored


def test_a_norm_that_is_folded_into_some_readers_only(tmp_path: Path) -> None:
    """The router reads the norm as well: a gain that it does without sends tokens to other experts."""
    source = saved("qwen2_moe", tmp_path / "source")
    all_of_it = fusion(source.skeleton)
    for part in ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "self_attn.k_proj.weight", "lm_head.weight"):
        changes = {n: replace(c, gain="") if n.endswith(part) else c for n, c in all_of_it.changes.items()}
        view = RotatedCheckpoint(
            source.checkpoint, replace(all_of_it, changes=changes), residual.rotation(source.skeleton, 0)
        )
        assert relative(logits(write(view, tmp_path / part)), logits(source.folder)) > 1e-4


def test_experts_merged_in_the_files(tmp_path: Path) -> None:
    """3-D tensors: gate_up [experts, 2 * width, hidden] reads, down [experts, hidden, width] writes."""
    source = saved("qwen3_moe", tmp_path / "source")
    model = load_tiny(source.folder, dtype=torch.float64)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text((source.folder / "config.json").read_text())
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    merged = Source(tmp_path / "merged")
    assert obstacle(merged.skeleton, merged.checkpoint) == ""
    for index in range(2):
        one, other = (s.skeleton.read_block(index, s.view()).tensors for s in (source, merged))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("width", [2, 5, 12, 20, 28, 36, 46, 64, 76, 92, 896])
def test_the_rotations(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
    identity, ones = torch.eye(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    free = Rotation(signs, keeps_mean=False)(identity)
    torch.testing.assert_close(free @ free.mT, identity, rtol=0, atol=1e-12)
    signs[0] = 1
    kept = Rotation(signs, keeps_mean=True)(identity)
    torch.testing.assert_close(kept @ kept.mT, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(ones @ kept, ones, rtol=0, atol=1e-11)
    if width >= 20:  # no channel is left as it is
        assert float(free.abs().max()) < 0.32
        assert float(kept.abs().max()) < 0.8
    if width == 896:
        assert float(free.abs().max()) == pytest.approx(896**-0.5)
        assert float(kept.abs().max()) < 6 * 896**-0.5


def test_a_rotation_that_moves_the_mean_breaks_layer_norm(tmp_path: Path) -> None:
    source = saved("gpt_neox", tmp_path / "source")
    free = replace(residual.rotation(source.skeleton, 0), keeps_mean=False)
    view = RotatedCheckpoint(source.checkpoint, fusion(source.skeleton), free)
    assert relative(logits(write(view, tmp_path / "rotated")), logits(source.folder)) > 1e-2


def test_centring_what_an_rms_norm_reads_is_a_change(tmp_path: Path) -> None:
    """Embeddings without their mean are those of another model; rotated embeddings keep their length."""
    source = saved("llama", tmp_path / "source")
    before = source.checkpoint.read("model.embed_tokens.weight")
    after = source.view().read("model.embed_tokens.weight")
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-12, atol=0)
    tensors = load_file(source.folder / "model.safetensors")
    expected = logits(source.folder)
    tensors["model.embed_tokens.weight"] = before - before.mean(1, keepdim=True)
    save_file(tensors, source.folder / "model.safetensors", {"format": "pt"})
    assert relative(logits(source.folder), expected) > 1e-3


def test_turned_further(tmp_path: Path) -> None:
    """By any orthogonal matrix, as learned ones are."""
    source = saved("llama", tmp_path / "source")
    view = source.view()
    matrix, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    before = view.read("model.embed_tokens.weight")
    view.turn_further(matrix)
    torch.testing.assert_close(view.read("model.embed_tokens.weight"), before @ matrix, rtol=0, atol=1e-12)
    assert relative(logits(write(view, tmp_path / "rotated")), logits(source.folder)) < 1e-10


def test_the_seed_decides(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.view().read(name), source.view().read(name))
    assert relative(source.view(seed=1).read(name), source.view().read(name)) > 0.5


def test_tensors_are_cast_last_and_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("qwen2_moe", tmp_path / "half", torch.bfloat16)
    source = Source(tmp_path / "half")
    view = source.view()
    whole = view.read_many(view.names)
    assert all(whole[name].dtype == source.checkpoint.names[name].dtype for name in source.checkpoint.names)
    name = "model.layers.1.self_attn.o_proj.weight"
    turned = residual.rotation(source.skeleton, 0)(source.checkpoint.read(name).double().mT).mT
    assert torch.equal(whole[name], turned.to(torch.bfloat16))
    monkeypatch.setattr(residual, "_CHUNK", 200)
    parts = view.read_many(view.names)
    assert all(relative(parts[name].double(), whole[name].double()) < 1e-3 for name in whole)


class Spy(Checkpoint):
    """Notes what is read."""

    asked: list[str]

    def read_many(self, names: Any) -> dict[str, Tensor]:
        names = list(names)
        self.asked += names
        return super().read_many(names)


def test_no_other_matrix_is_read(tmp_path: Path) -> None:
    """Beside what is asked for, one vector: of the norm that goes into it."""
    source = saved("qwen2_moe", tmp_path / "source", tie_word_embeddings=True)
    spy = Spy(source.folder, source.checkpoint.names)
    view = rotate(source.config, source.skeleton, spy, 0)[1]
    assert view.untied
    for name in view.names:
        spy.asked = []
        view.read(name)
        others = set(spy.asked) - {name, "model.embed_tokens.weight" if name == "lm_head.weight" else name}
        assert len(others) <= 1
        assert all(view.names[other].shape == (64,) for other in others)
        assert len(spy.asked) == 1 + len(others)


def test_untied_head_and_embedding(tmp_path: Path) -> None:
    source = saved("qwen2", tmp_path / "source")
    skeleton, view = rotate(source.config, source.skeleton, source.checkpoint, 0)
    assert source.skeleton.tied
    assert not skeleton.tied
    assert "lm_head.weight" in skeleton.other_tensors()
    assert source.config.tie_word_embeddings
    both = view.read_many(["lm_head.weight", "model.embed_tokens.weight"])
    alone = {name: view.read(name) for name in both}
    assert all(torch.equal(both[name], alone[name]) for name in both)
    size = source.checkpoint.nbytes_of("model.embed_tokens.weight")
    assert view.nbytes == source.checkpoint.nbytes + size
    assert view.source_bytes == source.checkpoint.nbytes
    assert "embeddings untied" in view.basis


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({}, "attention and MLP end in norms"),
    "gemma3": ({}, "attention and MLP end in norms"),
    "bloom": ({}, "stands behind the embeddings"),
    "bert": ({}, "the norms stand behind its sums"),
    "bert_classifier": ({}, "the norms stand behind its sums"),
    "opt": ({"do_layer_norm_before": False}, "OPTForCausalLM with do_layer_norm_before != True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated(name: str, tmp_path: Path) -> None:
    changes, why = REFUSED[name]
    save_tiny(name, tmp_path, **changes)
    source = Source(tmp_path)
    assert why in obstacle(source.skeleton, source.checkpoint)


def test_every_tiny_model_is_here() -> None:
    assert set(ALLOWED) | set(REFUSED) == set(TINY)


def rewritten(source: Source, **tensors: Tensor) -> Source:
    stored = load_file(source.folder / "model.safetensors")
    save_file(stored | tensors, source.folder / "model.safetensors", {"format": "pt"})
    return Source(source.folder)


def test_a_gain_of_zero(tmp_path: Path) -> None:
    """With a bias of 0 it can be folded; else the readers would need a bias."""
    name = "gpt_neox.layers.1.input_layernorm"
    source = saved("gpt_neox", tmp_path / "source")
    gain, bias = (source.checkpoint.read(f"{name}.{leaf}") for leaf in ("weight", "bias"))
    gain[3] = bias[3] = 0
    source = rewritten(source, **{f"{name}.weight": gain, f"{name}.bias": bias})
    assert obstacle(source.skeleton, source.checkpoint) == ""
    assert relative(logits(write(source.view(), tmp_path / "rotated")), logits(source.folder)) < 1e-10
    source = rewritten(source, **{f"{name}.bias": bias + 1})
    assert f"{name}.weight is 0 for a channel" in obstacle(source.skeleton, source.checkpoint)


def test_what_is_broken_is_seen_where_it_is(tmp_path: Path) -> None:
    name = "gpt_neox.layers.1.input_layernorm.weight"
    source = saved("gpt_neox", tmp_path / "source")
    gain = source.checkpoint.read(name)
    gain[5] = float("nan")
    source = rewritten(source, **{name: gain})
    assert obstacle(source.skeleton, source.checkpoint) == ""
    block = source.skeleton.read_block(1, source.view())
    broken = [path for path, tensor in block.tensors.items() if not tensor.isfinite().all()]
    assert broken == ["input_layernorm.weight"]


def test_unknown_matrices(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    extra = rewritten(source, **{"mtp.proj.weight": torch.zeros(8, 64)})
    assert "mtp.proj.weight, which transformers does not load" in obstacle(extra.skeleton, extra.checkpoint)
    table = extra.skeleton.architecture
    assert table is not None
    extra.skeleton.architecture = replace(table, residual=residual.Residual(writers=("self_attn.o_proj",)))
    assert "model.layers.0.mlp.down_proj.weight has to do" in obstacle(extra.skeleton, extra.checkpoint)
    extra.skeleton.architecture = None
    assert "is not in quantkit's architecture tables" in obstacle(extra.skeleton, extra.checkpoint)


def test_a_gemma_norm_becomes_one() -> None:
    weight = torch.full((4,), 3.0)
    turn(weight, Change("weight of a norm"), None, Rotation(torch.ones(4, dtype=torch.int8), False), 1.0)
    assert not weight.any()
