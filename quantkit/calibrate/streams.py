"""The hidden states that enter the current block, for all calibration samples.

``float`` went through blocks as they were, ``quantised`` through finished ones. Blocks are called with the arguments
that the model itself gave them when the samples were embedded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.calibrate.hidden import HiddenStates
from quantkit.models.stream import BlockStream, Captured

StreamName = Literal["float", "quantised"]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]

logger = logging.getLogger("quantkit")


class Streams:
    """One store of hidden states per stream that is asked for, all standing before block ``block``.

    Use as a context manager: it removes what was put on disk.
    """

    def __init__(
        self,
        stream: BlockStream,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        names: Sequence[StreamName] = ("quantised",),
        batch_size: int = 8,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        folder: Path | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """Embed the samples.

        Args:
            stream: runs the model's blocks; computes in a dtype of its own.
            input_ids: [samples, tokens].
            attention_mask: [samples, tokens], 0 where there is padding; None: no padding.
            names: the streams to carry.
            batch_size: samples per forward pass.
            dtype: in which the states are kept: float32 or bfloat16.
            max_bytes: a store that takes more than this is kept on disk; None: never.
            folder: where on disk; None: the system's folder for temporary files.
            warn: gets one sentence for every sample that is lost.
        """
        self.block = 0
        self.broken: dict[int, int] = {}
        """Sample -> the block whose output was NaN or Inf (-1: the embeddings); from there on its states are 0."""
        self._stream = stream
        self._ids = input_ids
        self._mask = attention_mask
        self._warn = warn
        self._calls: list[Calls] = []
        self._settings: dict[str, Any] = {
            "batch_size": batch_size, "dtype": dtype, "max_bytes": max_bytes, "folder": folder,
        }  # fmt: skip
        self.states: dict[StreamName, HiddenStates] = {}
        try:
            # Not in inference mode: tuning takes gradients through blocks that are called with what is captured here.
            with torch.inference_mode(False), torch.no_grad():
                self._embed(names, batch_size)
        except BaseException:
            self.close()
            raise

    def _embed(self, names: Sequence[StreamName], batch_size: int) -> None:
        kept: dict[tuple[tuple[int, ...], bytes], Calls] = {}
        for number, ids in enumerate(self._ids.split(batch_size)):
            mask = None if self._mask is None else self._mask[number * batch_size :][:batch_size]
            captured = self._stream.capture(ids, mask)
            if not self.states:
                self._width, self._compute_dtype = captured.hidden.shape[-1], captured.hidden.dtype
                self.states.update((name, self.new_states()) for name in names)
            # Batches of one shape and padding share their arguments, unless the model makes some of them from the
            # tokens (Gemma 3n: embeddings for every block).
            key = tuple(ids.shape), b"" if mask is None else mask.numpy().tobytes()
            calls = kept.setdefault(key, captured.calls)
            self._calls.append(calls if _same(calls, captured.calls, {}) else captured.calls)
            for name in names:
                self.states[name].replace(number, self._without_broken(name, number, captured.hidden, -1))

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        return len(self._calls)

    @property
    def tokens(self) -> int:
        """Tokens per sample, padding included."""
        return self._ids.shape[1]

    def samples(self, number: int) -> range:
        """The samples of batch ``number``."""
        return next(iter(self.states.values())).samples(number)

    def hidden(self, name: StreamName, number: int) -> Tensor:
        """What enters the current block: [batch, tokens, width] in the dtype that blocks compute in."""
        return self.states[name].batch(number).to(self._compute_dtype)

    def arguments(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What else the current block is called with: ``module(hidden, *args, **kwargs)``."""
        return self._calls[number][self.block]

    def token_mask(self, number: int) -> Tensor:
        """[batch, tokens] bool: False for padding and for samples that broke."""
        rows = self.samples(number)
        shape = len(rows), self.tokens
        mask = torch.ones(shape, dtype=torch.bool) if self._mask is None else self._mask[rows.start : rows.stop].bool()
        live = torch.tensor([sample not in self.broken for sample in rows])
        return mask & live[:, None]

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, name: StreamName, number: int, module: nn.Module) -> Tensor:
        """``module`` as the current block on batch ``number`` of a stream; the stream stays where it is."""
        captured = self._captured(number, self.hidden(name, number))
        return self._stream.run_block(module, captured.hidden, self.block, captured)

    def advance(self, outputs: Mapping[StreamName, nn.Module | HiddenStates]) -> None:
        """Take every stream behind the current block.

        Args:
            outputs: for each stream the module that is the block for it, or the states behind the block, from
                ``new_states``, which from then on belong to the stream.

        Raises:
            ValueError: a stream is missing, or not carried.
        """
        if outputs.keys() != self.states.keys():
            raise ValueError(f"streams {sorted(self.states)} are carried, got outputs for {sorted(outputs)}")
        for name, output in outputs.items():
            if isinstance(output, HiddenStates):
                self.states[name].close()
                self.states[name] = output
            for number in range(self.batches):
                module = None if isinstance(output, HiddenStates) else output
                hidden = self.states[name].batch(number) if module is None else self.run(name, number, module)
                sound = self._without_broken(name, number, hidden, self.block)
                if module is not None or sound is not hidden:
                    self.states[name].replace(number, sound)
        self.block += 1

    def _without_broken(self, name: StreamName, number: int, hidden: Tensor, block: int) -> Tensor:
        """``hidden`` behind ``block``, with samples that are not finite zeroed, after they were reported."""
        if torch.isfinite(hidden.sum(dtype=torch.float64)):
            return hidden
        broken = (self.token_mask(number) & ~torch.isfinite(hidden).all(dim=-1)).any(dim=1)  # [batch]
        where = f"block {block}" if block >= 0 else "the embeddings"
        for row in broken.nonzero().flatten().tolist():
            sample = self.samples(number)[row]
            self.broken[sample] = block
            self._warn(
                f"{where}: the output for calibration sample {sample} ({name} stream) holds NaN or Inf; the sample is "
                "left out from here on."
            )
        return hidden.masked_fill(broken[:, None, None], 0.0)

    def new_states(self) -> HiddenStates:
        """Room for a block's output, kept as the streams are."""
        return HiddenStates(len(self._ids), self.tokens, self._width, **self._settings)

    def logits(self, name: StreamName, number: int) -> Tensor:
        """[batch, tokens, vocabulary] once the stream is behind the last block."""
        hidden = self.hidden(name, number)
        return self._stream.logits(hidden, self._captured(number, hidden))

    def close(self) -> None:
        """Drop all states and their files."""
        for states in self.states.values():
            states.close()

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _captured(self, number: int, hidden: Tensor) -> Captured:
        rows = self.samples(number)
        mask = None if self._mask is None else self._mask[rows.start : rows.stop]
        return Captured(hidden, self._calls[number], self._ids[rows.start : rows.stop], mask)


def _same(one: Any, other: Any, known: dict[tuple[int, int], bool]) -> bool:
    """Two captured calls (tuples, lists, dicts, tensors, plain values) are equal.

    ``known`` remembers pairs of tensors: the blocks of a model are handed the same mask many times.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        pair = id(one), id(other)
        if pair not in known:
            known[pair] = one.dtype == other.dtype and torch.equal(one, other)
        return known[pair]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], known) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(_same(a, b, known) for a, b in zip(one, other, strict=True))
    return bool(one == other)
