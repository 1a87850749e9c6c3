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
) -> dict[str, Timing]:
    """Time ``candidates`` in turns.

    Args:
        device: where they compute; on a GPU seconds are between two events on the current stream.
        rounds: timed calls of each.
        warmup: untimed calls of each before that.
        most_seconds: no further round begins after this; three are always made.

    Returns:
        In the order of ``candidates``.
    """
    clock = _cuda_seconds if device.type == "cuda" else _seconds
    for number in range(warmup):
        for candidate in candidates.values():
            candidate(number)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > most_seconds:
            break
        for name, candidate in candidates.items():
            samples[name].append(clock(candidate, warmup + number))
    return {name: timing(times) for name, times in samples.items()}


def timing(samples: list[float]) -> Timing:
    """Of the seconds of at least one call."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def copies_past_the_cache(nbytes: int, cache_bytes: int) -> int:
    """Copies of ``nbytes`` each that together exceed the cache twice, at least one."""
    return max(1, -(-2 * cache_bytes // max(1, nbytes)))


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
