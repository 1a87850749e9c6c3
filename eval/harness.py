"""Timing of functions against each other, for every benchmark that compares: one clock, one protocol.

Candidates take turns, one call each, round after round: what else the machine does in the meantime falls on all of
them. Medians are reported, with the 20th and the 80th percentile. A candidate is called with the number of the round,
so that it can take another copy of its weights each time: in a model, too, the weights come from memory and not from
the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Candidate = Callable[[int], object]
"""Called with the number of the round; what it returns is dropped."""


class Timing(NamedTuple):
    """Seconds of one call, over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def compare(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    rounds: int = 30,
    warmup: int = 3,
    most_seconds: float = 20.0,
    graph_calls: int = 0,
) -> dict[str, Timing]:
    """Time ``candidates`` in turns.

    Args:
        device: where they compute; on a GPU seconds are between two events on the current stream.
        rounds: timed calls of each.
        warmup: untimed calls of each before that.
        most_seconds: no further round begins after this; three are always made.
        graph_calls: on a GPU a round of a candidate is one CUDA graph of so many calls, numbered from 0, so that what
            Python takes does not count; 0: a call is a call.

    Returns:
        In the order of ``candidates``.
    """
    clock, calls = _cuda_seconds if device.type == "cuda" else _seconds, 1
    for number in range(warmup):
        for candidate in candidates.values():
            candidate(number)
    if graph_calls and device.type == "cuda":
        calls = graph_calls
        candidates = {name: _graph(candidate, calls) for name, candidate in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > most_seconds:
            break
        for name, candidate in candidates.items():
            samples[name].append(clock(candidate, warmup + number) / calls)
    return {name: timing(times) for name, times in samples.items()}


def timing(samples: list[float]) -> Timing:
    """Of the seconds of at least one call."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def copies_past_the_cache(nbytes: int, cache_bytes: int) -> int:
    """Copies of ``nbytes`` each that together exceed the cache twice, at least one."""
    return max(1, -(-2 * cache_bytes // max(1, nbytes)))


def _graph(candidate: Candidate, calls: int) -> Candidate:
    """All of ``calls`` calls as one; each has been made before, so that nothing is compiled or tuned in here."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(calls):
            candidate(number)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            candidate(number)
    return lambda number: graph.replay()


def _seconds(candidate: Candidate, number: int) -> float:
    before = time.perf_counter()
    candidate(number)
    return time.perf_counter() - before


def _cuda_seconds(candidate: Candidate, number: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    candidate(number)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000
