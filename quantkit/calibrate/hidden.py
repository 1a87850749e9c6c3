"""Hidden states of all calibration samples, batch by batch: in memory, or in a file past a limit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from quantkit.errors import QuantkitError


class HiddenStates:
    """[samples, tokens, width] in batches of ``batch_size`` samples, the last one possibly smaller.

    No more than one batch is in memory where the states are on disk. There they are read and written rather than
    memory-mapped: a disk that fills up then is an error instead of a killed process, and what was read does not stay
    resident. The file has no name (on Windows: until it is closed), so nothing is left of it however the process ends.
    """

    def __init__(
        self,
        samples: int,
        tokens: int,
        width: int,
        *,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            samples, tokens, width: the shape; before they are replaced, the values mean nothing.
            batch_size: samples per batch.
            dtype: in which values are kept: float32 or bfloat16.
            max_bytes: keep them on disk if they take more than this; None: never.
            folder: where the file is made; None: the system's folder for temporary files.

        Raises:
            QuantkitError: ``folder`` cannot be written to.
        """
        self.shape = (samples, tokens, width)
        self.batch_size = batch_size
        self.dtype = dtype
        self._values: Tensor | None = None
        self._file: IO[bytes] | None = None
        if max_bytes is None or self.nbytes <= max_bytes:
            with torch.inference_mode(False):  # a store made in inference mode could not be written to outside
                self._values = torch.empty(self.shape, dtype=dtype)
            return
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="quantkit-hidden-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise QuantkitError(
                f"hidden states cannot be kept in {folder or tempfile.gettempdir()}: {error.strerror or error}; "
                "free some space there, or raise --max-memory."
            ) from None

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.shape[0] // self.batch_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def samples(self, number: int) -> range:
        """The samples of batch ``number``."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.shape[0]))

    def batch(self, number: int) -> Tensor:
        """Batch ``number``, [batch, tokens, width] of the kept dtype, in memory of its own."""
        rows = self.samples(number)
        if self._file is None:
            return self._memory()[rows.start : rows.stop].clone()
        batch = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        self._file.seek(rows.start * self._sample_bytes)
        left = _bytes(batch)
        while left.nbytes:  # the system may hand over less than was asked for
            count = self._file.readinto(left)  # type: ignore[attr-defined]  # a raw file has it
            if not count:
                raise RuntimeError(f"batch {number} of the hidden states is read before it was written")
            left = left[count:]
        return batch

    def replace(self, number: int, hidden: Tensor) -> None:
        """Put ``hidden`` [batch, tokens, width] in the place of batch ``number``.

        Raises:
            QuantkitError: the disk is full.
        """
        rows = self.samples(number)
        if hidden.shape != (len(rows), *self.shape[1:]):
            raise ValueError(f"batch {number} is {(len(rows), *self.shape[1:])}, got {tuple(hidden.shape)}")
        if self._file is None:
            self._memory()[rows.start : rows.stop].copy_(hidden)
            return
        left = _bytes(hidden.detach().to(self.dtype).contiguous())
        try:
            self._file.seek(rows.start * self._sample_bytes)
            while left.nbytes:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise QuantkitError(
                f"hidden states of {self.nbytes / 2**30:.1f} GiB cannot be written to disk: {error.strerror or error}; "
                "free some space, raise --max-memory, or use a smaller --nsamples."
            ) from None

    def close(self) -> None:
        """Drop the states and their file."""
        self._values = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _sample_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def _memory(self) -> Tensor:
        if self._values is None:
            raise RuntimeError("the hidden states are closed")
        return self._values


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).flatten().numpy().data
