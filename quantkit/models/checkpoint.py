"""Read a safetensors checkpoint tensor by tensor, so that no more than what was asked for is ever in memory.

A memory-mapped page counts as resident once it is touched and until the file is closed; files are therefore opened for
one read and closed behind it, and what is handed out is always a copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import QuantkitError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_MAPPED_BYTES = 64 * 2**20
"""Reopen a file after this many bytes: the pages behind a read stay resident until its file is closed."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, known from the file's header alone."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The tensors of a model folder under the names they have in its files."""

    basis = ""
    """How the residual stream is changed against that of the files, in a few words; empty: it is not."""

    def __init__(self, folder: Path, names: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.names = names

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of every shard of ``folder``; no weight is read.

        Raises:
            QuantkitError: no safetensors file, several without an index, an index that cannot be read or that names a
                missing shard or tensor, a shard that is truncated or corrupt, a dtype that is not supported.
        """
        if (folder / WEIGHTS_NAME).is_file():  # transformers looks for this one first, too
            return cls(folder, _read_header(folder / WEIGHTS_NAME))
        if (folder / INDEX_NAME).is_file():
            return cls(folder, _read_index(folder / INDEX_NAME))
        loose = sorted(folder.glob("*.safetensors"))
        if not loose:
            raise QuantkitError(f"{folder} holds no safetensors file; quantkit reads weights in that format only.")
        if len(loose) > 1:
            raise QuantkitError(
                f"{folder} holds {len(loose)} safetensors files ({loose[0].name}, ...) but no {INDEX_NAME} that says "
                "which tensors are whose; save the model again with save_pretrained, or fetch the index."
            )
        return cls(folder, _read_header(loose[0]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.names.values())

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors that are in the files."""
        return self.nbytes

    def nbytes_of(self, name: str) -> int:
        """Bytes of the tensor ``name`` as stored."""
        return self.names[name].nbytes

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its stored dtype, in memory of its own."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names`` (checkpoint names) in their stored dtypes, in memory of their own.

        Raises:
            QuantkitError: a shard changed or went away since its header was read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.names[name].file, []).append(name)
        tensors = {}
        for file, here in by_file.items():
            for part in self._portions(here):
                try:
                    with safe_open(file, framework="pt") as shard:
                        tensors.update({name: shard.get_tensor(name).clone() for name in part})
                except (SafetensorError, OSError) as error:
                    raise _damaged(file, error) from None
        return tensors

    def _portions(self, names: list[str]) -> Iterator[list[str]]:
        """``names`` in order, cut so that each part but the last just passes ``_MAPPED_BYTES``."""
        part: list[str] = []
        nbytes = 0
        for name in names:
            part.append(name)
            nbytes += self.names[name].nbytes
            if nbytes >= _MAPPED_BYTES:
                yield part
                part, nbytes = [], 0
        if part:
            yield part


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as shard:
            stored = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            headers = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in stored.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    for name, (dtype, _) in headers.items():
        if dtype not in _DTYPES:
            raise QuantkitError(
                f"{file}: tensor {name} has dtype {dtype}, which is not supported; convert the model to bfloat16 first."
            )
    return {name: TensorInfo(file, _DTYPES[dtype], shape) for name, (dtype, shape) in headers.items()}


def _read_index(file: Path) -> dict[str, TensorInfo]:
    try:
        weight_map: dict[str, str] = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        raise QuantkitError(f"{file} is not a safetensors index (JSON with a 'weight_map'); fetch it again.") from None
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise QuantkitError(f"{file} names the shard {shard}, which is outside its folder; fetch the index again.")
        if not (file.parent / shard).is_file():
            raise QuantkitError(f"{file} names the shard {shard}, which is not in the folder; fetch the missing file.")
        shards[shard] = _read_header(file.parent / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise QuantkitError(f"{file} says that tensor {name} is in {shard}, but it is not; fetch both files again.")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _damaged(file: Path, error: Exception) -> QuantkitError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return QuantkitError(
        f"{file} cannot be read: it is truncated, corrupt or no safetensors file ({reason}); fetch it again."
    )
