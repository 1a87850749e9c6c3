"""The keys or the values of one layer as packed chunks, with the first and the newest tokens as they came.

    token number    0 .. S - 1    S .. S + C W - 1        S + C W ..
    held            sink          C chunks of W, packed   tail

Chunk boundaries depend on the number of a token alone, S + i W. While the tail holds W + ``recent`` tokens or more, its
oldest W are packed, so what is packed after n tokens is ``(n - S - recent) // W`` chunks, however the tokens came; only
``keep`` may leave more. Packed chunks lie in arenas with room for a few more, an eighth of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kv.codebooks import WIDTH
from quantkit.kv.nsn_encode import Chunks, Coder, matrix
from quantkit.kv.quantiser import straight, wide


@dataclass(frozen=True)
class View:
    """What a store holds, for an attention that multiplies codes itself; no copies. ``Coder`` and ``Chunks`` say what
    the parts are, ``nsn_encode.py`` what they stand for."""

    coder: Coder
    sink: Tensor
    """[batch, heads, S or fewer, head_dim], as it came; the first tokens held."""
    chunks: Chunks | None
    """Behind the sink; None: nothing is packed."""
    start: int
    """Position of the first token of the first chunk, for ``coder.rope``; the next chunks begin W further each."""
    tail: Tensor
    """[batch, heads, tokens, head_dim], as it came; behind the chunks."""

    @cached_property
    def starts(self) -> Tensor:
        """int64 [C]: the position of the first token of each chunk."""
        count = 0 if self.chunks is None else self.chunks.count
        return self.start + self.coder.window * torch.arange(count, device=self.tail.device)


class NSNStore:
    """A ``Store``.

    Args:
        coder: of the chunks.
        sink: S, first tokens that are never packed.
        recent: newest tokens that are never packed.
    """

    def __init__(self, coder: Coder, sink: int, recent: int) -> None:
        self.hold = False
        """Pack nothing before ``settle``: new tokens may be taken back."""
        self._coder, self._sinks, self._recent = coder, sink, recent
        self._sink: Tensor | None = None
        self._tail: Tensor | None = None
        self._arena: Chunks | None = None
        self._first = self._last = 0
        """Numbers of the first chunk held and of the next to be packed."""
        self._dropped = 0
        """Tokens of the sink that were dropped."""

    @property
    def length(self) -> int:
        return 0 if self._sink is None or self._tail is None else self._held_sink + self._packed + self._tail.shape[2]

    @property
    def elements(self) -> int:
        if self._tail is None:
            return 0
        batch, heads, _, head_dim = self._tail.shape
        return batch * heads * self.length * head_dim

    @property
    def grain(self) -> tuple[int, int]:
        return self._held_sink, self._coder.window

    def coded_after(self, tokens: int) -> int:
        window = self._coder.window
        return max(0, (tokens - self._sinks - self._recent) // window * window)

    def append(self, states: Tensor) -> Tensor:
        self.put(states)
        read = self.read(0, self.length, states.dtype)
        if states.requires_grad and torch.is_grad_enabled():
            old = read.shape[2] - states.shape[2]
            return torch.cat([read[:, :, :old], straight(states, lambda _: read[:, :, old:])], dim=2)
        return read

    @torch.no_grad()
    def put(self, states: Tensor) -> None:
        with torch.autocast(states.device.type, enabled=False):  # sums have to be in float32
            self._take(states.detach())
            if not self.hold:
                self.settle()

    @torch.no_grad()
    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert self._sink is not None
        assert self._tail is not None
        sink, window, packed = self._held_sink, self._coder.window, self._packed
        parts = [self._sink[:, :, first:last].to(dtype)]
        start, stop = max(0, first - sink), min(last - sink, packed)
        if start < stop:
            at, end = start // window, -(-stop // window)
            with torch.autocast(self._tail.device.type, enabled=False):
                read = self._coder.decode(self._chunks().part(at, end), self._starts()[at:end], dtype).flatten(2, 3)
            parts.append(read[:, :, start - at * window : stop - at * window])
        behind = sink + packed
        parts.append(self._tail[:, :, max(0, first - behind) : max(0, last - behind)].to(dtype))
        return torch.cat(parts, dim=2)

    @torch.no_grad()
    def settle(self) -> None:
        """Pack what is due."""
        window = self._coder.window
        due = 0 if self._tail is None else (self._tail.shape[2] - self._recent) // window
        if self._tail is None or due < 1:
            return
        states = self._tail[:, :, : due * window].unflatten(2, (due, window))
        numbers = torch.arange(self._last, self._last + due, device=states.device)
        self._store(self._coder.encode(states, self._sinks + window * numbers))
        self._tail = self._tail[:, :, due * window :].clone()

    def keep(self, first: int, last: int) -> None:
        """As ``Store`` says; a chunk that is not complete cannot go before it is, either.

        Raises:
            QuantkitError: ``last`` would part a chunk that is packed; nothing is changed then.
        """
        sink, window, length = self._held_sink, self._coder.window, self.length
        last = min(last, length)
        if self._sink is None or self._tail is None:
            return
        if sink < last < sink + self._packed and (last - sink) % window:
            raise QuantkitError(
                f"the last {length - last} tokens cannot be taken back: {sink + self._packed - last} of them are "
                f"packed, in chunks of {window} that cannot be parted; call activate_past_recording() on the cache "
                f"before they are made, or set min_recent (now {self._recent}) to as many as are taken back at a time."
            )
        if last < length:
            left = max(0, last - sink)
            packed = min(left // window, self._count)
            self._last = self._first + packed
            self._tail = self._tail[:, :, : left - packed * window].clone()
            self._sink = self._sink[:, :, :last].clone()
        self._drop(first)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._sink, self._tail = (None if part is None else change(part) for part in (self._sink, self._tail))
        self._arena = None if self._arena is None else self._arena.each(change)

    def tensors(self) -> Iterable[Tensor]:
        yield from (part for part in (self._sink, self._tail) if part is not None)
        if self._arena is not None and self._tail is not None:
            yield from self._arena.tensors().values()
            yield self._coder.codebook.on(self._tail.device)
            yield matrix(self._tail.shape[-1], wide(self._tail.dtype), self._tail.device)

    def state(self) -> dict[str, Tensor]:
        if self._sink is None or self._tail is None:
            return {}
        counts = torch.tensor([self._first, self._last, self._dropped])
        chunks = {} if not self._count else self._chunks().tensors()
        return {"sink": self._sink, "tail": self._tail, "counts": counts} | {
            name: part.contiguous() for name, part in chunks.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        chunks = {name: part for name, part in state.items() if name not in ("sink", "tail", "counts")}
        self._sink, self._tail = state.get("sink"), state.get("tail")
        self._first, self._last, self._dropped = state["counts"].tolist() if state else (0, 0, 0)
        self._arena = Chunks(**chunks) if chunks else None

    def view(self) -> View | None:
        """What is held; None: nothing. Valid until the store is next changed."""
        if self._sink is None or self._tail is None:
            return None
        start = self._sinks + self._coder.window * self._first
        return View(self._coder, self._sink, self._chunks() if self._count else None, start, self._tail)

    @property
    def _held_sink(self) -> int:
        return 0 if self._sink is None else self._sink.shape[2]

    @property
    def _count(self) -> int:
        """Chunks held."""
        return self._last - self._first

    @property
    def _packed(self) -> int:
        """Tokens in them."""
        return self._count * self._coder.window

    def _chunks(self) -> Chunks:
        assert self._arena is not None
        return self._arena.part(0, self._count)

    def _starts(self) -> Tensor:
        device = None if self._tail is None else self._tail.device
        return self._sinks + self._coder.window * torch.arange(self._first, self._last, device=device)

    def _take(self, states: Tensor) -> None:
        """Put new tokens into the sink and the tail; copies, since of a view the whole would stay alive."""
        if self._sink is None or self._tail is None:
            check_width("keys or values", states.shape[-1])
            self._sink, self._tail = states[:, :, :0].clone(), states[:, :, :0].clone()
        # Tokens have passed the sink once it was full; all of it may have been dropped since.
        room = max(0, self._sinks - self._dropped - self._held_sink)
        if room:
            self._sink = torch.cat([self._sink, states[:, :, :room]], dim=2)
        if states.shape[2] > room:
            self._tail = torch.cat([self._tail, states[:, :, room:]], dim=2)

    def _store(self, new: Chunks) -> None:
        """Put packed chunks behind those held."""
        count, total = self._count, self._count + new.count
        if self._arena is None or not count:
            self._arena = new
        else:
            # Outside of inference mode, what was made in it cannot be written to.
            frozen = self._arena.codes.is_inference() and not torch.is_inference_mode_enabled()
            if total > self._arena.count or frozen:
                self._arena = self._arena.each(lambda part: _with_room(part, count, total + total // 8))
            held = self._arena.tensors()
            for name, part in new.tensors().items():
                held[name][:, :, count:total] = part
        self._last += new.count

    def _drop(self, first: int) -> None:
        """Drop the tokens before number ``first`` of those held, whole chunks of them."""
        assert self._sink is not None
        assert self._tail is not None
        window = self._coder.window
        sink = min(first, self._held_sink)
        chunks = (first - self._held_sink) // window
        if sink > 0:
            self._sink = self._sink[:, :, sink:].clone()
            self._dropped += sink
        if chunks < 1:
            return
        packed = min(chunks, self._count)
        if packed:
            left = None if packed == self._count else self._chunks().part(packed, self._count)
            self._arena = None if left is None else left.each(torch.clone)
            self._first += packed
        waiting = min(chunks - packed, self._tail.shape[2] // window)
        if waiting:  # not yet packed, and never going to be
            self._tail = self._tail[:, :, waiting * window :].clone()
            self._first, self._last = self._first + waiting, self._last + waiting


def check_width(what: str, width: int) -> None:
    """Refuse vectors of ``width`` numbers that cannot be cut into eights.

    Raises:
        QuantkitError: it is so.
    """
    if width % WIDTH:
        raise QuantkitError(
            f"NSNQuant codes {WIDTH} numbers at a time, but {what} of one head have {width}; use another cache method "
            "for this model, for example rotation-2bit."
        )


def _with_room(part: Tensor, count: int, room: int) -> Tensor:
    """An arena for ``room`` chunks that begins with the first ``count`` of ``part`` [batch, heads, C, ...]."""
    with torch.inference_mode(False):
        arena = part.new_zeros(*part.shape[:2], room, *part.shape[3:])
    arena[:, :, :count] = part[:, :, :count]
    return arena
