"""Names, shapes and blocks of a model without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, VOCABULARY, make_tiny, save_tiny
from torch import Tensor, nn
from transformers import GPT2Config, Olmo2Config, OlmoeConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from quantkit.errors import QuantkitError
from quantkit.models.checkpoint import WEIGHTS_NAME, Checkpoint
from quantkit.models.skeleton import Skeleton, _find_blocks, restore_buffers
from quantkit.models.source import load_config

MIXTURES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def skeleton_of(folder: Path) -> tuple[Skeleton, Checkpoint]:
    checkpoint = Checkpoint.open(folder)
    return Skeleton(load_config(folder), checkpoint), checkpoint


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of ``source`` in ``folder`` whose tensors went through ``change``."""
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    stored = {name: tensor.contiguous() for name, tensor in change(load_file(source / WEIGHTS_NAME)).items()}
    save_file(stored, folder / WEIGHTS_NAME)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_linears_are_every_matrix_but_the_routers(name: str, tiny: Callable[..., Path]) -> None:
    skeleton, _ = skeleton_of(tiny(name))
    model = make_tiny(TINY[name]())
    for index in range(skeleton.num_blocks):
        block = model.get_submodule(skeleton.block_prefix(index).rstrip("."))
        matrices = {path: p for path, p in block.named_parameters() if p.dim() >= 2}
        left_out = {path for path in matrices if path in ("mlp.gate.weight", "mlp.shared_expert_gate.weight")}
        expected = sum(p.numel() for path, p in matrices.items() if path not in left_out)
        assert sum(info.out_features * info.in_features for info in skeleton.linears(index)) == expected
        for info in skeleton.linears(index):
            assert info.has_bias == (f"{info.name}.bias" in dict(block.named_parameters()))
    assert skeleton.num_blocks == 2
    assert skeleton.tied == bool(model.config.tie_word_embeddings and model.get_output_embeddings() is not None)


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_has_one_place(name: str, tiny: Callable[..., Path]) -> None:
    """Blocks, the rest and the extras make up the checkpoint, and names lead back to where they came from."""
    skeleton, checkpoint = skeleton_of(tiny(name))
    canonical = list(skeleton.other_tensors())
    for index in range(skeleton.num_blocks):
        canonical += [skeleton.block_prefix(index) + local for local in skeleton.block_tensors(index)]
    assert {skeleton.checkpoint_name(each) for each in canonical} == set(checkpoint.names)
    assert len(canonical) == len(checkpoint.names)
    assert skeleton.extra_tensors() == ()
    for each in canonical:
        assert skeleton.tensor_info(each, checkpoint) == checkpoint.names[skeleton.checkpoint_name(each)]


def test_read_block(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen2", torch.bfloat16)
    skeleton, checkpoint = skeleton_of(folder)
    block = skeleton.read_block(1, checkpoint)
    stored = load_file(folder / WEIGHTS_NAME)
    assert (block.index, block.prefix) == (1, "model.layers.1.")
    assert set(block.stored_dtypes.values()) == {torch.bfloat16}
    assert set(block.tensors) == {n.removeprefix(block.prefix) for n in stored if n.startswith(block.prefix)}
    for local, tensor in block.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[block.prefix + local].float())
    block.weight("mlp.up_proj").zero_()
    assert skeleton.read_block(1, checkpoint).weight("mlp.up_proj").any()


def test_new_tensors_of_known_modules(tmp_path: Path) -> None:
    """``weight_packed`` goes where ``weight`` was, in the checkpoint's own words."""
    save_tiny("mixtral", tmp_path)
    skeleton, checkpoint = skeleton_of(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in checkpoint.names
    packed = skeleton.checkpoint_name("model.layers.0.mlp.experts.3.w1.weight_packed")
    assert packed == "model.layers.0.block_sparse_moe.experts.3.w1.weight_packed"
    assert skeleton.checkpoint_name("model.layers.1.mlp.gate.new") == "model.layers.1.block_sparse_moe.gate.new"
    assert skeleton.checkpoint_name("model.norm.extra.deep") == "model.norm.extra.deep"


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model."), ("bloom", "transformer."), ("opt", "model.")])
def test_checkpoint_of_the_base_model(name: str, prefix: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Published BLOOM and OPT checkpoints lack the causal model's prefix; canonical names have it all the same."""
    source = tiny(name)
    rewrite(source, tmp_path, lambda stored: {key.removeprefix(prefix): tensor for key, tensor in stored.items()})
    whole, bare = skeleton_of(source)[0], skeleton_of(tmp_path)[0]
    bare.check(Checkpoint.open(tmp_path))
    assert bare.block_tensors(1) == whole.block_tensors(1)
    assert set(bare.other_tensors()) == set(whole.other_tensors())
    local = bare.block_prefix(1) + bare.linears(1)[0].name
    assert bare.checkpoint_name(f"{local}.weight_scale") == f"{local.removeprefix(prefix)}.weight_scale"


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint with 3-D experts gives the same blocks as one that has them one by one."""
    source = tiny(name)
    fused = make_tiny(TINY[name]())  # the module's own parameters are 3-D
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({key: tensor.contiguous() for key, tensor in fused.state_dict().items()}, tmp_path / WEIGHTS_NAME)
    one_by_one, three_d = skeleton_of(source), skeleton_of(tmp_path)
    three_d[0].check(three_d[1])
    assert three_d[0].linears(1) == one_by_one[0].linears(1)
    expected = one_by_one[0].read_block(1, one_by_one[1]).tensors
    found = three_d[0].read_block(1, three_d[1]).tensors
    assert set(found) == set(expected)
    assert all(torch.equal(found[local], expected[local]) for local in found)
    gate, _, down = MIXTURES[name]
    prefix = "model.layers.1.mlp.experts"
    assert three_d[0].tensor_info(f"{prefix}.2.{down}.weight", three_d[1]).shape == (64, 40)
    assert three_d[0].checkpoint_name(f"{prefix}.2.{gate}.weight_packed") == f"{prefix}.2.{gate}.weight_packed"


def test_bert_as_it_was_published(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Norms with gamma and beta, and heads that the class in config.json does not have."""
    heads = {"cls.seq_relationship.weight": torch.ones(2, 64), "bert.pooler.dense.bias": torch.ones(64)}

    def change(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        for new, old in (("weight", "gamma"), ("bias", "beta")):
            stored = {key.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): tensor for key, tensor in stored.items()}
        return stored | heads

    rewrite(tiny("bert"), tmp_path, change)
    (now, checkpoint), (old, published) = skeleton_of(tiny("bert")), skeleton_of(tmp_path)
    old.check(published)
    assert set(old.extra_tensors()) == set(heads)
    found, expected = old.read_block(1, published), now.read_block(1, checkpoint)
    assert set(found.tensors) == set(expected.tensors)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    norm = "bert.encoder.layer.1.output.LayerNorm"
    assert old.checkpoint_name(f"{norm}.weight") == f"{norm}.gamma"


def test_extra_tensors(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks beyond the model's (multi-token prediction) and old rotary buffers."""
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.ones(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    rewrite(tiny("llama"), tmp_path, lambda stored: stored | extra)
    skeleton, checkpoint = skeleton_of(tmp_path)
    skeleton.check(checkpoint)
    assert set(skeleton.extra_tensors()) == set(extra)


@pytest.mark.parametrize(
    "kept", [{"lm_head.weight"}, {"model.embed_tokens.weight"}, {"lm_head.weight", "model.embed_tokens.weight"}]
)
def test_tied_head(kept: set[str], tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Either of the two tied tensors, or both, may be in the file."""

    def change(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        table = stored.pop("model.embed_tokens.weight")
        return stored | {name: table.clone() for name in kept}

    rewrite(tiny("qwen2"), tmp_path, change)
    skeleton, checkpoint = skeleton_of(tmp_path)
    skeleton.check(checkpoint)
    assert skeleton.tied
    assert kept < set(skeleton.other_tensors())


def test_shards(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    make_tiny(TINY["llama"]()).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded, one = skeleton_of(tmp_path), skeleton_of(tiny("llama"))
    found, expected = sharded[0].read_block(0, sharded[1]), one[0].read_block(0, one[1])
    assert all(torch.equal(found.tensors[local], tensor) for local, tensor in expected.tensors.items())


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", [104, 64]),
        ("llama", "model.norm.weight", [64]),
        ("qwen2_moe", "model.layers.1.mlp.experts.4.down_proj.weight", [64, 40]),
    ],
)
def test_wrong_shape(name: str, tensor: str, shape: list[int], tiny: Callable[..., Path], tmp_path: Path) -> None:
    rewrite(tiny(name), tmp_path, lambda stored: stored | {tensor: stored[tensor][:-1]})
    skeleton, checkpoint = skeleton_of(tmp_path)
    with pytest.raises(QuantkitError) as caught:
        skeleton.check(checkpoint)
    assert f"tensor {tensor} has shape {[shape[0] - 1, *shape[1:]]}, but config.json makes it {shape}" in str(
        caught.value
    )
    assert WEIGHTS_NAME in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("qwen2", "model.embed_tokens.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.4.down_proj.weight"),
    ],
)
def test_missing_tensor(name: str, tensor: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    rewrite(tiny(name), tmp_path, lambda stored: {key: value for key, value in stored.items() if key != tensor})
    skeleton, checkpoint = skeleton_of(tmp_path)
    with pytest.raises(QuantkitError, match=r"needs is in no file; the checkpoint is incomplete") as caught:
        skeleton.check(checkpoint)
    assert tensor in str(caught.value)


def test_config_of_a_larger_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rewrite(tiny("llama"), tmp_path, lambda stored: stored)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    skeleton, checkpoint = skeleton_of(tmp_path)
    with pytest.raises(QuantkitError, match=r"tensor model\.layers\.2\.\S+ and \d+ more"):
        skeleton.check(checkpoint)


SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def test_unknown_architecture(tmp_path: Path) -> None:
    make_tiny(Olmo2Config(**SMALL, intermediate_size=96, pad_token_id=0)).save_pretrained(tmp_path)
    skeleton, checkpoint = skeleton_of(tmp_path)
    skeleton.check(checkpoint)
    assert skeleton.architecture is None
    assert [info.name.rpartition(".")[2] for info in skeleton.linears(2)] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert skeleton.sites(0) == ()
    assert (
        "Olmo2ForCausalLM is not in quantkit's architecture tables: every nn.Linear in 'model.layers'"
        in skeleton.limits
    )
    assert "\n" not in skeleton.limits


def test_unknown_mixture(tmp_path: Path) -> None:
    config = OlmoeConfig(**SMALL, intermediate_size=40, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    make_tiny(config).save_pretrained(tmp_path)
    skeleton, checkpoint = skeleton_of(tmp_path)
    skeleton.check(checkpoint)
    assert {info.name.partition(".")[0] for info in skeleton.linears(0)} == {"self_attn"}
    assert "these stay in full precision: mlp.experts.down_proj, mlp.experts.gate_up_proj" in skeleton.limits


def test_not_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(QuantkitError, match=r"'vit' cannot be built as a language model \(AutoModelForCausalLM\)"):
        skeleton_of(tmp_path)


def test_nothing_to_quantise(tmp_path: Path) -> None:
    """GPT-2 keeps its matrices in modules of its own."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    make_tiny(config).save_pretrained(tmp_path)
    skeleton, checkpoint = skeleton_of(tmp_path)
    with pytest.raises(QuantkitError, match=r"GPT2LMHeadModel has no nn\.Linear in 'transformer\.h'"):
        skeleton.check(checkpoint)


def test_no_repeated_blocks() -> None:
    with pytest.raises(QuantkitError, match="Linear has no list of 5 blocks"):
        _find_blocks(nn.Linear(1, 1), SimpleNamespace(num_hidden_layers=5))


class Halved(nn.Module):
    """Holds half of a weight, as a packed layer would hold its own tensors."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.register_buffer("weight_half", torch.zeros(out_features, in_features, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight_half)


class HalvingQuantizer:
    """As much of a transformers quantizer as a packed checkpoint needs: experts stay modules, one by one."""

    def preprocess_model(self, model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            experts, width, hidden = layer.mlp.experts.gate_up_proj.shape
            shapes = {"w1": (width // 2, hidden), "w3": (width // 2, hidden), "w2": (hidden, width // 2)}
            layer.mlp.experts = nn.ModuleList(
                nn.ModuleDict({name: Halved(*shape) for name, shape in shapes.items()}) for _ in range(experts)
            )

    def update_weight_conversions(self, conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return [entry for entry in conversions if isinstance(entry, WeightRenaming)]


def test_packed_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """With a quantizer, names and blocks are those of the packed layers."""
    source = tiny("mixtral")

    def pack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = {key.replace(".weight", ".weight_half"): t / 2 for key, t in stored.items() if ".experts." in key}
        return packed | {key: t for key, t in stored.items() if ".experts." not in key}

    rewrite(source, tmp_path, pack)
    checkpoint = Checkpoint.open(tmp_path)
    skeleton = Skeleton(load_config(tmp_path), checkpoint, quantizer=HalvingQuantizer())  # type: ignore[arg-type]
    skeleton.check(checkpoint)
    assert skeleton.extra_tensors() == ()
    prefix = skeleton.block_prefix(1)
    names = [prefix + local for local in skeleton.block_tensors(1)]
    tensors = {key.removeprefix(prefix): t for key, t in skeleton.read_tensors(names, checkpoint).items()}
    block = skeleton.build_block(1, tensors, torch.float32)
    plain = load_file(source / WEIGHTS_NAME)["model.layers.1.block_sparse_moe.experts.4.w3.weight"]
    x = torch.randn(3, 64)
    torch.testing.assert_close(block.mlp.experts[4]["w3"](x), x @ plain.T)


def test_buffer_that_nobody_computes(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, _ = skeleton_of(tiny("llama"))
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None)
    rotary = skeleton.new_model(torch.float32).get_submodule("model.rotary_emb")
    with pytest.raises(QuantkitError, match=r"the buffer model\.rotary_emb\.inv_freq is in no checkpoint"):
        restore_buffers(skeleton.model, "model.rotary_emb", rotary)


def test_blocks_do_not_share_what_they_hold(tiny: Callable[..., Path]) -> None:
    skeleton, checkpoint = skeleton_of(tiny("llama"))
    tensors = skeleton.read_block(0, checkpoint).tensors
    block = skeleton.build_block(0, tensors, torch.float16)
    assert not block.training
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in skeleton.block_module(0).parameters())


def test_build_block_names_what_is_missing(tiny: Callable[..., Path]) -> None:
    skeleton, checkpoint = skeleton_of(tiny("llama"))
    tensors = skeleton.read_block(0, checkpoint).tensors
    del tensors["mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj\.weight"):
        skeleton.build_block(0, tensors, torch.float32)
