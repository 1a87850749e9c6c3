"""From a source folder to logits in a fresh process, for every architecture.

The reference is independent of QuantLinear and of the pipeline: the stored codes, decoded by ``from_tensors``, are
written as a plain float checkpoint and run by plain transformers.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, make_tiny, save_tiny
from transformers import AutoModelForCausalLM, StableLmConfig

import quantkit
from quantkit.formats.config import read_config
from quantkit.formats.layer import from_tensors, weight_tensors
from quantkit.formats.writer import read_record
from quantkit.kernels.online import apply
from quantkit.models.checkpoint import Checkpoint
from quantkit.pipeline import prepare
from quantkit.presets import expand

RUNS = {
    "native": {"method": "sinq", "scheme": "W3A16G32"},
    "online": {"recipe": {"scheme": "W4A16G32", "steps": [{"method": "sinq", "options": {"absorb": "never"}}, "rtn"]}},
    "portable": {"method": "rtn", "scheme": "W4A16GC"},
    "w8a8": {"method": "rtn", "scheme": "W8A8"},
}
CASES = [(name, run) for name in TINY for run in RUNS]
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")  # plain transformers cannot run experts with quantised activations


def dense_copy(quantised: Path, folder: Path) -> Path:
    """The checkpoint with every packed linear decoded to float32, as a plain model folder."""
    folder.mkdir()
    config = json.loads((quantised / "config.json").read_text())
    formats = read_config(config.pop("quantization_config"))
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(quantised)
    tensors = checkpoint.read_many(checkpoint.names)
    modules = {
        row["stored"]: row["layer"]
        for event in read_record(quantised / "quantkit-run.jsonl")
        for row in event.get("layers", ())
    }
    dense = {}
    for stored, layer in modules.items():
        own = [name for name in tensors if name.rpartition(".")[0] == stored and not name.endswith(".bias")]
        local = {name.removeprefix(stored + "."): tensors.pop(name) for name in own}
        layer_format = formats.of(layer)
        assert layer_format is not None, layer
        weight, inputs = from_tensors(local, layer_format)
        dense[f"{stored}.weight"] = weight.dequantize()
        if inputs.op != "none":  # its rows are M @ e for every unit vector e
            dense[f"{stored}.weight"] @= apply(torch.eye(weight.codes.shape[1]), inputs).mT
        if inputs.shift is not None:
            bias = tensors[f"{stored}.bias"]
            tensors[f"{stored}.bias"] = bias.float() + dense[f"{stored}.weight"] @ inputs.shift.float()
        if inputs.scale is not None:
            dense[f"{stored}.weight"] *= inputs.scale.float()
    save_file(dense | tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory) -> dict[str, Path]:
    """'arch-run' -> quantised folder."""
    root = tmp_path_factory.mktemp("quantised")
    folders = {}
    for name, run in CASES:
        folders[f"{name}-{run}"] = root / f"{name}-{run}"
        quantkit.quantize(str(tiny(name)), output=folders[f"{name}-{run}"], **RUNS[run])
    return folders


def fresh(loader: str, folders: list[Path], output: Path) -> dict[str, torch.Tensor]:
    script = str(Path(fresh_logits.__file__))
    subprocess.run([sys.executable, script, loader, str(output), *map(str, folders)], check=True)
    return load_file(output)


@pytest.fixture(scope="module")
def reloaded(outputs, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """Loader -> 'arch-run' -> logits, each loader in one fresh process."""
    root = tmp_path_factory.mktemp("logits")
    kinds = {name: json.loads((folder / "config.json").read_text()) for name, folder in outputs.items()}
    kinds = {name: config["quantization_config"]["quant_method"] for name, config in kinds.items()}
    native = [folder for name, folder in outputs.items() if kinds[name] == "quantkit"]
    portable = [folder for name, folder in outputs.items() if kinds[name] == "compressed-tensors"]
    found = {
        "quantkit": fresh("quantkit", list(outputs.values()), root / "q"),
        "native": fresh("native", native, root / "n"),
    }
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        return found
    return found | {"transformers": fresh("transformers", portable, root / "t")}


@pytest.mark.parametrize(("name", "run"), CASES, ids=[f"{name}-{run}" for name, run in CASES])
def test_fresh_load_equals_decoded_codes(outputs, reloaded, name, run, tmp_path):
    key = f"{name}-{run}"
    block = json.loads((outputs[key] / "config.json").read_text())["quantization_config"]
    portable = block["quant_method"] == "compressed-tensors"
    assert portable == (run == "portable" or (run == "w8a8" and name not in EXPERTS))
    logits = reloaded["quantkit"][key]
    if run != "w8a8":  # its activations are rounded too, which the decoded float model does not do
        expected = fresh_logits.logits_of("transformers-in-process", dense_copy(outputs[key], tmp_path / "dense"))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if not portable:
        torch.testing.assert_close(reloaded["native"][key], logits, rtol=0, atol=0)
    elif "transformers" in reloaded and key != "opt-w8a8":  # compressed-tensors takes OPT's 2-D inputs for one token
        torch.testing.assert_close(reloaded["transformers"][key], logits, rtol=1e-5, atol=1e-5)


def test_quantising_changes_the_weights_and_not_too_much(outputs, tiny):
    for name in TINY:
        events = read_record(outputs[f"{name}-native"] / "quantkit-run.jsonl")
        errors = [row["error"] for event in events for row in event.get("layers", ())]
        assert min(errors) > 0.05, name
        assert max(errors) < 0.35, name


def test_every_expert_is_quantised(outputs):
    for name, expected in (("mixtral", 2 * 5 * 3), ("qwen3_moe", 2 * 6 * 3), ("qwen2_moe", 1 * 6 * 3)):
        names = Checkpoint.open(outputs[f"{name}-portable"]).names
        packed = [n for n in names if ".experts." in n and n.endswith("weight_packed")]
        assert len(packed) == expected
        assert not [n for n in names if ".experts." in n and n.endswith(".weight")]


def test_same_bytes_again(tiny, tmp_path):
    for out in ("a", "b"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / out, method="sinq", scheme="W3A16G32")
    for file in ("model.safetensors", "config.json", "quantkit-recipe.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bfloat16_source_keeps_its_dtypes(tmp_path):
    save_tiny("qwen3", tmp_path / "source", torch.bfloat16)
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", method="sinq", scheme="W4A16G32")
    names = Checkpoint.open(tmp_path / "out").names
    assert names["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert names["model.layers.0.self_attn.q_proj.weight_scale"].dtype == torch.bfloat16
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "out", tmp_path / "dense"))
    found = fresh_logits.logits_of("quantkit", tmp_path / "out")
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_unknown_architecture_is_quantised_weight_only(tmp_path):
    config = StableLmConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=199, max_position_embeddings=128,
    )  # fmt: skip
    make_tiny(config).save_pretrained(tmp_path / "source")
    plan, _, _ = prepare(str(tmp_path / "source"), expand(method="sinq", scheme="W4A16G32"))
    assert any("StableLmForCausalLM is not in quantkit's architecture tables" in note for note in plan.notes)
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", method="sinq", scheme="W4A16G32")
    expected = fresh_logits.logits_of("in-process", dense_copy(tmp_path / "out", tmp_path / "dense"))
    torch.testing.assert_close(fresh_logits.logits_of("quantkit", tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_tensors_that_transformers_does_not_load_are_carried_over(tiny, tmp_path):
    source = Path(shutil.copytree(tiny("qwen3"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    extra = {"mtp.layers.0.weight": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16), "mtp.count": torch.tensor([3])}
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    quantkit.quantize(str(source), output=tmp_path / "out", method="rtn", scheme="W4A16G32", dtype="float16")
    found = Checkpoint.open(tmp_path / "out").read_many(extra)
    assert all(torch.equal(found[name], extra[name]) and found[name].dtype == extra[name].dtype for name in extra)


def test_side_files_are_copied_as_they_are(tiny, tmp_path):
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "source"))
    (source / "tokenizer.model").write_bytes(b"\x00\x01spm")
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    (source / "assets").mkdir()
    (source / "assets" / "notes.txt").write_text("kept")
    (source / "README.md").write_text("the source's card")
    (source / "pytorch_model.bin").write_bytes(b"never copied")
    quantkit.quantize(str(source), output=tmp_path / "out", method="rtn", scheme="W4A16GC")
    for name in ("tokenizer.model", "chat_template.jinja", "assets/notes.txt", "README.md", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_sharded_source_and_sharded_output_give_the_same_tensors(tiny, tmp_path, monkeypatch):
    whole = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype="auto")
    whole.save_pretrained(tmp_path / "source", max_shard_size="60kB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 3
    quantkit.quantize(str(tiny("mixtral")), output=tmp_path / "one", method="sinq", scheme="W4A16G32")
    monkeypatch.setattr("quantkit.formats.writer.SINGLE_FILE_BYTES", 0)
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "many", method="sinq", scheme="W4A16G32")
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.nbytes == one.nbytes
    assert set(one.names) == set(many.names)
    for name in one.names:
        assert torch.equal(one.read(name), many.read(name)), name
    found = fresh_logits.logits_of("quantkit", tmp_path / "many")
    torch.testing.assert_close(found, fresh_logits.logits_of("quantkit", tmp_path / "one"), rtol=0, atol=0)


def test_checkpoint_with_fused_experts(tiny, tmp_path):
    """Newer checkpoints may hold experts as transformers' modules do, merged in 3-D tensors."""
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"), dtype="auto")
    (tmp_path / "fused").mkdir()
    shutil.copy(tiny("qwen3_moe") / "config.json", tmp_path / "fused")
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight" or not
             model.config.tie_word_embeddings}  # fmt: skip
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    save_file(state, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    for name, source in (("a", tiny("qwen3_moe")), ("b", tmp_path / "fused")):
        quantkit.quantize(str(source), output=tmp_path / name, method="sinq", scheme="W4A16GC")
    found = fresh_logits.logits_of("quantkit", tmp_path / "b")
    torch.testing.assert_close(found, fresh_logits.logits_of("quantkit", tmp_path / "a"), rtol=0, atol=0)


def test_a_save_that_reads_back_differently_is_an_error(tiny, tmp_path, monkeypatch):
    def wrong(*args):
        tensors = weight_tensors(*args)
        tensors["weight_scale"] = tensors["weight_scale"].roll(1, 0)
        return tensors

    monkeypatch.setattr("quantkit.blockwise.weight_tensors", wrong)
    with pytest.raises(quantkit.QuantkitError, match="saved block 0 answers the probe differently"):
        quantkit.quantize(str(tiny("llama")), output=tmp_path / "out", method="rtn", scheme="W4A16G32")
    assert not list(tmp_path.iterdir())


def test_bits_per_weight_are_the_formula(tmp_path):
    source = tmp_path / "source"
    save_tiny("llama", source, torch.bfloat16, hidden_size=256, intermediate_size=256, num_key_value_heads=4)
    for scheme, expected in (("W4A16G64", 4 + 16 / 64), ("W3A16G32", 3 + (16 + 3) / 32), ("W2A16G64", 2 + 18 / 64)):
        result = quantkit.quantize(str(source), output=tmp_path / scheme, method="rtn", scheme=scheme)
        plan, _, _ = prepare(str(source), expand(method="rtn", scheme=scheme))
        weight_shape = 8 * 16 / (256 * 256)  # two int64 per matrix
        assert result.bits_per_weight == pytest.approx(expected + weight_shape, rel=1e-9)
        assert plan.output_bytes == result.output_bytes
