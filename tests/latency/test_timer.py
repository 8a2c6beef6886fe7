"""The timer, on a clock that moves only when a call says so."""

from __future__ import annotations

import itertools
import math

import pytest

from autoprune.latency.timer import SETTLE_MS, Protocol, measure_together, speedup


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_lead_calls_are_made_before_each_sample_and_not_timed(lead: int) -> None:
    now, calls = 0.0, [0, 0]

    def call(which: int, took_s: float) -> None:
        nonlocal now
        calls[which] += 1
        now += took_s

    protocol = Protocol(samples=4, warmup=2, min_sample_ms=0.0, lead=lead)
    candidates = {"slow": lambda: call(0, 0.006), "fast": lambda: call(1, 0.002)}
    times = measure_together(candidates, protocol, lambda: now)
    assert times["slow"].samples_ms == pytest.approx([6.0] * 4)
    assert times["fast"].samples_ms == pytest.approx([2.0] * 4)
    assert speedup(times["slow"], times["fast"]) == pytest.approx(3.0)
    assert calls == [2 + 4 * (1 + lead)] * 2


def test_with_several_threads_a_sample_waits_until_those_of_the_candidate_before_sleep() -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        calls += 1
        now += 2.0**-7

    measure_together({"a": call}, Protocol(samples=2, warmup=1, threads=2, min_sample_ms=0.0, lead=1), lambda: now)
    enough = math.ceil(SETTLE_MS / 1e3 * 2**7)
    assert calls == 1 + 2 * (1 + enough + 1)


def test_a_cold_call_after_another_candidate_is_not_timed_with_a_lead() -> None:
    now, last = 0.0, ""

    def call(name: str) -> None:
        nonlocal now, last
        now += 0.001 if last == name else 0.005  # somebody else's data was in the caches
        last = name

    def times(lead: int) -> list[float]:
        candidates = {"a": lambda: call("a"), "b": lambda: call("b")}
        protocol = Protocol(samples=3, warmup=2, min_sample_ms=0.0, lead=lead)
        return [taken.median_ms for taken in measure_together(candidates, protocol, lambda: now).values()]

    assert times(1) == pytest.approx([1.0, 1.0])
    assert max(times(0)) == pytest.approx(5.0)


def test_every_round_is_told_when_it_is_done() -> None:
    ticks, calls = itertools.count(), []
    protocol = Protocol(samples=3, warmup=1, min_sample_ms=0.0)
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    measure_together(candidates, protocol, lambda: float(next(ticks)), lambda: calls.append("done"))
    assert calls == ["a", "b", "a", "b", "done", "b", "a", "done", "a", "b", "done"]
