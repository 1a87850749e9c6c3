"""Write a checkpoint block by block so that it is either complete or plainly not there.

Everything goes into ``<output>.partial`` beside the output. Each file is written under a temporary name, synced and
renamed; ``config.json`` comes last; then the folder itself takes its final name. A run that is stopped leaves finished
blocks behind, and ``resume`` goes on after them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.errors import QuantkitError, RecipeError

RUN_RECORD = "quantkit-run.jsonl"
RECIPE_FILE = "quantkit-recipe.yaml"
RECORD_VERSION = 1
"""Of the run record's lines; grows when a reader of the old ones would misunderstand the new."""
INDEX = "model.safetensors.index.json"
SINGLE_FILE_BYTES = 64 * 2**20
"""Outputs up to this size become one file; merging larger ones would hold them in memory."""

_WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .h5 .msgpack .onnx .onnx_data .ot .npz .tflite .mlmodel".split()  # noqa: SIM905
)


class ResumableError(QuantkitError):
    """A failure of the machine, not of the input: finished blocks are kept and ``--resume`` goes on after them."""


class CheckpointWriter:
    """Collects the shards of one run.

    Args:
        output: the folder to create.
        fingerprint: anything JSON that must be the same for a resumed run (recipe, source files).
        shards: how many shards the checkpoint will have.
        about: what the run record says of the run as a whole.

    Raises:
        RecipeError: ``output`` is a file, or not empty without ``overwrite``; or it holds the source.
    """

    def __init__(
        self,
        output: Path,
        source: Path,
        fingerprint: Any,
        shards: int,
        about: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.shards = shards
        self._source = source
        self._overwrite = overwrite
        check_output(output, source, overwrite=overwrite)
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        self.done: dict[str, dict[str, Any]] = {}
        if resume and self._restore(digest):
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        with _disk(self.folder):
            self.folder.mkdir(parents=True)
        self.record({"event": "start", "record_version": RECORD_VERSION, "fingerprint": digest, **about})

    def _restore(self, digest: str) -> bool:
        path = self.folder / RUN_RECORD
        if not path.exists():
            return False
        events = read_record(path)
        if not events or events[0].get("fingerprint") != digest:
            raise RecipeError(
                f"{self.folder} was begun with another recipe or source, so it cannot be resumed: "
                "run without --resume to start over, or repeat the first command."
            )
        for event in events:
            if event["event"] == "shard" and (self.folder / self._shard_name(event["number"])).exists():
                self.done[event["key"]] = event
        # A kill can cut the last line short; what follows must start on a line of its own.
        write_atomic(path, "".join(json.dumps(event) + "\n" for event in events).encode())
        return True

    def record(self, event: Mapping[str, Any]) -> None:
        """Append one line to the run record."""
        with _disk(self.folder), open(self.folder / RUN_RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_shard(self, key: str, number: int, tensors: Mapping[str, Tensor], event: Mapping[str, Any]) -> None:
        """Commit one shard; ``key`` marks it as done for a resumed run, ``event`` is kept with it in the record."""
        self._save(tensors, self._shard_name(number))
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.done[key] = {"event": "shard", "key": key, "number": number, "bytes": size, **event}
        self.record(self.done[key])

    def read_shard(self, event: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a committed shard, by its line in the run record."""
        return load_file(self.folder / self._shard_name(event["number"]))

    def write_side_files(self, texts: Mapping[str, str]) -> None:
        """Copy every file of the source that is not weights or config.json, then write ``texts`` (name -> content).

        A text never replaces a file of the source.
        """
        for path in _side_files(self._source):
            target = self.folder / path.relative_to(self._source)
            with _disk(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                _sync(target)
        for name, text in texts.items():
            if not (self.folder / name).exists():
                self._write_text(name, text)

    def finish_weights(self) -> None:
        """Merge small shards into one file, or write the index."""
        files = [self._shard_name(event["number"]) for event in self.done.values()]
        sizes = {file: (self.folder / file).stat().st_size for file in files}
        if sum(sizes.values()) <= SINGLE_FILE_BYTES:
            merged: dict[str, Tensor] = {}
            for file in files:
                merged |= load_file(self.folder / file)
            self._save(merged, "model.safetensors")
            for file in files:
                (self.folder / file).unlink()
            return
        weight_map: dict[str, str] = {}
        for file in sorted(files):
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    weight_map[name] = file
        total = sum(event["bytes"] for event in self.done.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self._write_text(INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.json, the file that makes the folder a model: written last."""
        self._write_text("config.json", json.dumps(config, indent=2) + "\n")

    def publish(self) -> None:
        """Give the finished folder its final name."""
        with _disk(self.output):
            if self.output.exists():
                old = self.output.with_name(self.output.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.output, old)
                os.replace(self.folder, self.output)
                shutil.rmtree(old)
            else:
                os.replace(self.folder, self.output)
            _sync(self.output.parent)

    def discard(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shard_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def _save(self, tensors: Mapping[str, Tensor], name: str) -> None:
        temporary = self.folder / f"{name}.tmp"
        with _disk(self.folder / name):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, {"format": "pt"})
            temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            _sync(temporary)
            os.replace(temporary, self.folder / name)

    def _write_text(self, name: str, text: str) -> None:
        with _disk(self.folder / name):
            write_atomic(self.folder / name, text.encode())


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something; see ``CheckpointWriter``."""
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output {output} is a file; name a folder.")
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise RecipeError(f"output {output} holds the source model {source}; write somewhere else.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise RecipeError(f"output folder {output} is not empty; use --overwrite to replace it, or name another.")


def read_record(path: Path) -> list[dict[str, Any]]:
    """The events of a run record; a last line cut short by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``path`` so that it holds either the old content or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line that names the file."""
    try:
        yield
    except Exception as error:
        # safetensors reports I/O errors as its own exception type with the message only.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            raise ResumableError(
                f"disk full while writing {path}: free some space and repeat the command with --resume, "
                "or write to another disk."
            ) from None
        if isinstance(error, OSError):
            raise QuantkitError(f"cannot write {path}: {error.strerror or error}.") from None
        raise


def _side_files(source: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        local = path.relative_to(source)
        if any(part.startswith(".") for part in local.parts) or local.name in ("config.json", RUN_RECORD, RECIPE_FILE):
            return False
        return path.suffix.lower() not in _WEIGHT_SUFFIXES and not local.name.endswith(".index.json")

    return sorted(path for path in source.rglob("*") if path.is_file() and wanted(path))


def source_fingerprint(source: Path) -> dict[str, Any]:
    """Name, size and time of every weight file, and config.json's content: changes when the source does."""
    files = sorted(source.glob("*.safetensors"))
    return {
        "config": (source / "config.json").read_text(encoding="utf-8"),
        "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
    }
