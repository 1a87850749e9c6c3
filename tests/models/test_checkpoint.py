"""Reading safetensors: what is handed out, what stays in memory, and what damaged folders are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import QuantkitError
from quantkit.models.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def tensors(blocks: int = 3, width: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"block.{i}.weight": torch.randn(width, width, generator=generator) for i in range(blocks)}


def save_sharded(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """One shard per tensor and an index."""
    weight_map = {name: f"model-{i:05d}.safetensors" for i, name in enumerate(stored)}
    for name, file in weight_map.items():
        save_file({name: stored[name]}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8], ids=str)
def test_one_file(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: (tensor * 10).abs().to(dtype) for name, tensor in tensors().items()}
    save_file(stored, tmp_path / WEIGHTS_NAME)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.nbytes == 3 * 64 * dtype.itemsize
    assert {name: (info.dtype, info.shape) for name, info in checkpoint.names.items()} == dict.fromkeys(
        stored, (dtype, (8, 8))
    )
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_shards(tmp_path: Path) -> None:
    stored = tensors()
    save_sharded(tmp_path, stored)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names["block.1.weight"].file == tmp_path / "model-00001.safetensors"
    read = checkpoint.read_many(["block.2.weight", "block.0.weight"])
    assert set(read) == {"block.2.weight", "block.0.weight"}
    assert all(torch.equal(read[name], stored[name]) for name in read)


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "weights.safetensors")
    assert len(Checkpoint.open(tmp_path).names) == 3


@needs_proc
def test_nothing_stays_mapped(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME)
    read = Checkpoint.open(tmp_path).read_many(tensors())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(read) == 3


@needs_proc
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """24 blocks of 4 MiB, read one after the other: the second half takes no more memory than the first."""
    stored = {f"block.{i}.weight": torch.full((1024, 1024), float(i)) for i in range(24)}
    save_file(stored, tmp_path / WEIGHTS_NAME)
    del stored
    checkpoint = Checkpoint.open(tmp_path)
    resident = []
    for index in range(24):
        block = checkpoint.read_many([f"block.{index}.weight"])
        assert block[f"block.{index}.weight"][0, 0] == index
        del block
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        resident.append(int(status["VmRSS"].split()[0]))
    assert max(resident[12:]) - max(resident[:12]) < 8192  # KiB; the second half is 48 MiB


@pytest.mark.parametrize("keep", [0, 6, 200, -1], ids=["empty", "in the length", "in the header", "last byte"])
def test_truncated_shard(tmp_path: Path, keep: int) -> None:
    save_sharded(tmp_path, tensors())
    shard = tmp_path / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(QuantkitError, match=r"model-00001\.safetensors cannot be read: .*fetch it again"):
        Checkpoint.open(tmp_path)


def test_corrupt_header(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME)
    content = bytearray((tmp_path / WEIGHTS_NAME).read_bytes())
    content[8:40] = b"\xff" * 32
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(QuantkitError, match=r"model\.safetensors cannot be read"):
        Checkpoint.open(tmp_path)


def test_shard_lost_after_opening(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME)
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(QuantkitError, match=r"model\.safetensors cannot be read"):
        checkpoint.read("block.0.weight")


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    save_sharded(tmp_path, tensors())
    (tmp_path / "model-00002.safetensors").unlink()
    with pytest.raises(QuantkitError, match=r"index\.json names the shard model-00002\.safetensors, which is not in"):
        Checkpoint.open(tmp_path)


def test_index_names_a_missing_tensor(tmp_path: Path) -> None:
    save_sharded(tmp_path, tensors())
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["block.9.weight"] = "model-00002.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(QuantkitError, match=r"tensor block\.9\.weight is in model-00002\.safetensors, but it is not"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_unreadable_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(QuantkitError, match="is not a safetensors index"):
        Checkpoint.open(tmp_path)


def test_loose_files(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    save_file(tensors(), tmp_path / "b.safetensors")
    with pytest.raises(QuantkitError, match=r"2 safetensors files \(a\.safetensors, \.\.\.\) but no"):
        Checkpoint.open(tmp_path)


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="no safetensors file"):
        Checkpoint.open(tmp_path)


def test_unsupported_dtype(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, dtype=torch.complex64)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(QuantkitError, match="tensor x has dtype C64"):
        Checkpoint.open(tmp_path)
