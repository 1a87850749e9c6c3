"""From a source folder to logits in a fresh process, for every architecture.

The reference is independent of QuantLinear and of the pipeline: the stored codes, decoded by ``from_tensors``, are
written as a plain float checkpoint and run by plain transformers.
"""

import json
import subprocess
import sys
from pathlib import Path

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_tiny

import quantkit
from quantkit.formats.config import read_config
from quantkit.formats.layer import from_tensors
from quantkit.formats.writer import read_record
from quantkit.models.checkpoint import Checkpoint

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
        weight, input_scale = from_tensors(local, layer_format)
        dense[f"{stored}.weight"] = weight.dequantize()
        if input_scale is not None:
            dense[f"{stored}.weight"] *= input_scale.float()
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
