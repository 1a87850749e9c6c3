"""Where models come from, and what is said about folders and names that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from quantkit.errors import QuantkitError, RecipeError
from quantkit.models.source import auto_class, load_config, resolve


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tiny llama that may be damaged."""
    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_local_folder(folder: Path) -> None:
    assert resolve(str(folder)) == folder
    assert load_config(folder).model_type == "llama"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, AutoModelForCausalLM),
        (["LlamaForCausalLM"], AutoModelForCausalLM),
        (["LlamaForSequenceClassification"], AutoModelForSequenceClassification),
        (["SomebodysOwnModel"], AutoModelForCausalLM),
    ],
)
def test_the_first_architecture_decides_the_class(names: list[str] | None, expected: type) -> None:
    assert auto_class(LlamaConfig(architectures=names)) is expected
    assert auto_class(BertConfig(architectures=["BertForMaskedLM", *(names or ())])) is AutoModelForMaskedLM


def test_demo() -> None:
    assert load_config(resolve("demo")).model_type == "llama"


def test_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"revision 'main' was given, but .* is no hub id"):
        resolve(str(folder), revision="main")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(QuantkitError, match=r"has no config\.json"):
        resolve(str(folder))


@pytest.mark.parametrize("text", ["{", "[1]", ""], ids=["cut off", "a list", "empty"])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(QuantkitError, match=r"config\.json (cannot be read as JSON|must be a JSON object)"):
        resolve(str(folder))


def test_impossible_config(folder: Path) -> None:
    change_config(folder, hidden_size="many")
    with pytest.raises(QuantkitError, match=r"config\.json is not a usable configuration: .*hidden_size"):
        resolve(str(folder))


def test_a_file(folder: Path) -> None:
    with pytest.raises(QuantkitError, match="is a file; give the folder"):
        resolve(str(folder / "config.json"))


def test_pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(QuantkitError, match=r"pickle files only \(pytorch_model\.bin\).*save_pretrained"):
        resolve(str(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(QuantkitError, match="has no safetensors weights"):
        resolve(str(folder))


def test_quantised_already(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(QuantkitError, match=r"quantised already \(quant_method 'gptq'.*original model"):
        resolve(str(folder))
    assert resolve(str(folder), allow_quantized=True) == folder


def test_remote_code(folder: Path) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"})
    with pytest.raises(RecipeError, match=r"type 'mine' runs code .* --trust-remote-code"):
        resolve(str(folder))


def test_own_code_of_a_model_that_transformers_has(folder: Path) -> None:
    """Such checkpoints (the first Phi-3) load with transformers' code, without any flag."""
    change_config(folder, auto_map={"AutoConfig": "configuration_mine.MineConfig"})
    assert resolve(str(folder)) == folder


def test_unknown_model_type(folder: Path) -> None:
    change_config(folder, model_type="mine")
    with pytest.raises(QuantkitError, match="does not know model_type 'mine'"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["a b/c", "./nowhere", "one/two/three"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(QuantkitError, match="neither a folder nor a hub id"):
        resolve(name)


def test_hub_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(QuantkitError, match=r"cannot be reached for 'owner/model' \(offline\?\).* a local folder"):
        resolve("owner/model")
