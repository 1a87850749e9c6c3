"""Candidates take turns; each call of one gets the next number."""

from __future__ import annotations

import time

import pytest
import torch

from quantkit.eval.harness import compare, copies_past_the_cache, timing

CPU = torch.device("cpu")


def test_candidates_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    found = compare(
        {name: lambda number, name=name: calls.append((name, number)) for name in "ab"},  # type: ignore[misc]
        CPU,
        rounds=4,
        warmup=2,
    )
    assert calls == [(name, number) for number in range(6) for name in "ab"]
    assert list(found) == ["a", "b"]
    assert {t.rounds for t in found.values()} == {4}


def test_seconds_of_one_call() -> None:
    found = compare({"sleeps": lambda _: time.sleep(0.02), "does not": lambda _: None}, CPU, rounds=3, warmup=0)
    assert found["sleeps"].median >= 0.02 > 10 * found["does not"].median


def test_a_slow_candidate_ends_the_rounds_after_three() -> None:
    found = compare({"slow": lambda _: time.sleep(0.02)}, CPU, rounds=100, warmup=0, most_seconds=0.01)
    assert found["slow"].rounds == 3


def test_percentiles() -> None:
    assert timing([5.0, 1.0, 4.0, 2.0, 3.0, 11.0]) == pytest.approx((3.5, 2.0, 5.0, 6))
    assert timing([7.0]) == (7.0, 7.0, 7.0, 1)


def test_copies_exceed_the_cache_twice() -> None:
    assert [copies_past_the_cache(size, 100) for size in (1, 70, 100, 200, 201)] == [200, 3, 2, 1, 1]
    assert copies_past_the_cache(10, 0) == 1
