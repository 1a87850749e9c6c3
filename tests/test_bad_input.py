"""Bad input through the command line: one line that names the thing and the way out, an exit status, no output."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.formats import writer
from quantkit.models.checkpoint import Checkpoint

TENSOR = "model.layers.1.mlp.up_proj.weight"


def run(*arguments: object) -> tuple[int, str]:
    """(exit status, last line of stderr) of ``quantkit ARGUMENTS``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = result.stderr.strip().splitlines()
    return result.exit_code, lines[-1] if lines else ""


def refused(source: Path, out: Path, *flags: object) -> tuple[int, str]:
    """Quantise ``source``, which must fail with one line and leave nothing."""
    code, line = run("quantize", source, "-o", out, *flags)
    assert line.startswith("quantkit: ")
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    return code, line


@pytest.fixture
def source(tiny, tmp_path) -> Path:
    """A tiny Llama that the test may damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "source"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    model = save_tiny("llama", tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100kB")
    return tmp_path / "sharded"


def change(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_folder_without_config(source, tmp_path):
    (source / "config.json").unlink()
    code, line = refused(source, tmp_path / "out")
    assert code == 1
    assert "config.json" in line


def test_truncated_file(source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    code, line = refused(source, tmp_path / "out")
    assert code == 1
    assert "model.safetensors" in line
    assert "truncated" in line


def test_file_that_is_no_safetensors(source, tmp_path):
    (source / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "model.safetensors" in refused(source, tmp_path / "out")[1]


def test_index_that_names_a_missing_shard(sharded, tmp_path):
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    code, line = refused(sharded, tmp_path / "out")
    assert code == 1
    assert gone.name in line


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd"])
def test_index_that_points_outside_its_folder(sharded, tmp_path, shard):
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][TENSOR] = shard
    path.write_text(json.dumps(index))
    code, line = refused(sharded, tmp_path / "out")
    assert code == 1
    assert shard in line
    assert "outside" in line


def test_tensor_of_the_wrong_shape(source, tmp_path):
    change(source, TENSOR, lambda weight: weight[:, :-8].contiguous())
    code, line = refused(source, tmp_path / "out")
    assert code == 1
    assert TENSOR in line
    assert "[104, 56]" in line
    assert "[104, 64]" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(source, tmp_path, value):
    def damage(weight):
        weight[3, 5] = value
        return weight

    change(source, TENSOR, damage)
    code, line = refused(source, tmp_path / "out")
    assert code == 1
    assert TENSOR in line
    assert "--allow-nonfinite" in line
    assert run("quantize", source, "-o", tmp_path / "kept", "--allow-nonfinite", "--method", "sinq")[0] == 0
    names = Checkpoint.open(tmp_path / "kept").names
    assert TENSOR in names
    assert "model.layers.1.mlp.gate_proj.weight_packed" in names
    block = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in block["ignore"]


def test_pickle_only_checkpoint(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    code, line = refused(source, tmp_path / "out")
    assert code == 1
    assert "pickle" in line
    assert "save_pretrained" in line


def test_output_that_is_not_empty(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    code, line = run("quantize", source, "-o", tmp_path / "out")
    assert code == 2
    assert "--overwrite" in line
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_output_that_holds_the_source(source):
    code, line = run("quantize", source, "-o", source, "--overwrite")
    assert code == 2
    assert "source" in line
    assert (source / "model.safetensors").exists()


def test_full_disk_keeps_finished_blocks_for_resume(source, tmp_path, monkeypatch):
    written = []

    def save_until_full(tensors, path, metadata=None):
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(writer, "save_file", save_until_full)
    code, line = run("quantize", source, "-o", tmp_path / "out")
    assert code == 1
    assert "disk full" in line
    assert "--resume" in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    monkeypatch.undo()
    assert run("quantize", source, "-o", tmp_path / "out", "--resume")[0] == 0
    assert not (tmp_path / "out.partial").exists()


def test_group_size_that_does_not_divide(source, tmp_path):
    code, line = refused(source, tmp_path / "out", "--scheme", "W4A16G64", "--format", "compressed-tensors")
    assert code == 2
    assert "down_proj" in line
    assert "104" in line
    assert run("quantize", source, "-o", tmp_path / "out", "--scheme", "W4A16G64")[0] == 0


def test_source_that_is_quantised_already(source, tmp_path):
    assert run("quantize", source, "-o", tmp_path / "once")[0] == 0
    code, line = refused(tmp_path / "once", tmp_path / "twice")
    assert code == 1
    assert "quantised" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method", "sinqq"], "Did you mean 'sinq'"),
        (["--scheme", "W4G"], "W4A16G64"),
        (["--scheme", "W4A4KV4", "--format", "compressed-tensors"], "no field for keys and values of 4 bits"),
        (["--method", "rtn+sinq"], "first"),
        (["--method", "rtn+rtn"], "exactly one rounding"),
        (["--ignore", "*"], "nothing is left"),
    ],
)
def test_requests_that_cannot_be_carried_out(source, tmp_path, flags, expected):
    code, line = refused(source, tmp_path / "out", *flags)
    assert code == 2
    assert expected in line


def test_recipe_with_an_unknown_key(source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W4A16G64\nsteps: [rtn]\nignored: [lm_head]\n")
    code, line = refused(source, tmp_path / "out", "--recipe", recipe)
    assert code == 2
    assert "recipe.yaml" in line
    assert "Did you mean 'ignore'" in line


def test_option_of_a_method_that_does_not_exist(source, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"scheme": "W4A16G64", "steps": [{"method": "sinq", "options": {"sweep": 3}}, "rtn"]}))
    code, line = refused(source, tmp_path / "out", "--recipe", recipe)
    assert code == 2
    assert "Did you mean 'sweeps'" in line


def test_hub_id_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, line = refused(Path("some-org/some-model"), tmp_path / "out")
    assert code == 1
    assert "some-org/some-model" in line
    assert "offline" in line
    assert "folder" in line


def test_model_that_brings_its_own_code(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "configuration_mystery.MysteryConfig"}}
    (source / "config.json").write_text(json.dumps(config))
    code, line = refused(source, tmp_path / "out")
    assert code == 2
    assert "--trust-remote-code" in line


def test_interrupt_leaves_nothing_that_looks_complete(tmp_path):
    source = tmp_path / "source"
    save_tiny("llama", source, num_hidden_layers=40)
    command = [sys.executable, "-m", "quantkit", "quantize", source, "-o", tmp_path / "out", "--method", "rtn"]
    partial = tmp_path / "out.partial"
    for _ in range(4):  # on a busy machine the run may be over before the signal is sent
        process = subprocess.Popen([*command, "--overwrite"], stderr=subprocess.PIPE, text=True)
        while len(list(partial.glob("model-*.safetensors"))) < 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert not (tmp_path / "out").exists()
    assert not (partial / "config.json").exists()
    assert not (partial / "model.safetensors.index.json").exists()
    done = sorted(partial.glob("model-*.safetensors"))
    stamps = {file.name: file.stat().st_mtime_ns for file in done}
    assert run("quantize", source, "-o", tmp_path / "other", "--method", "rtn")[0] == 0
    process = subprocess.run([*command, "--resume"], check=True)
    assert stamps
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
