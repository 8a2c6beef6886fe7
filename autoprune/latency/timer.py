"""The timer: things compared are timed in turns within one run, so that noise falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from autoprune.latency.quiet import timing

Clock = Callable[[], float]  # seconds, monotonic
SETTLE_MS = 100.0
"""After so long the idle threads of the candidate before are asleep: engines keep them busy waiting for more work, on
the cores that the next candidate's threads need."""


@dataclass(frozen=True)
class Protocol:
    """How latency is measured.

    Attributes:
        samples: timed rounds; every round times each candidate once, in alternating order.
        warmup: untimed calls of each candidate before the first round.
        threads: torch intra-op threads while measuring.
        min_sample_ms: calls are repeated within a sample until it lasts about this long, in milliseconds.
        lead: untimed calls before each sample: one gives every candidate warm caches. Where several threads work, as
            many more as last `SETTLE_MS`.
    """

    samples: int = 50
    warmup: int = 5
    threads: int = 1
    min_sample_ms: float = 0.5
    lead: int = 0


@dataclass(frozen=True)
class Latency:
    """Latency of one candidate, milliseconds a call."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples_ms: tuple[float, ...]
    threads: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ({self.p10_ms:.3f}-{self.p90_ms:.3f})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_samples(cls, samples_ms: list[float], threads: int, device: str = "cpu") -> Latency:
        ordered = sorted(samples_ms)

        def at(fraction: float) -> float:
            return ordered[min(len(ordered) - 1, round(fraction * (len(ordered) - 1)))]

        return cls(statistics.median(ordered), at(0.1), at(0.9), tuple(samples_ms), threads, device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets torch's intra-op threads and restores them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_together(
    candidates: Mapping[str, Callable[[], object]],
    protocol: Protocol | None = None,
    clock: Clock = time.perf_counter,
    round_done: Callable[[], None] = lambda: None,
) -> dict[str, Latency]:
    """Times every candidate, interleaved, in inference mode, while no other run of this user works or times.

    Round i of each candidate is taken within the same fraction of a second, so ratios of two candidates
    (`speedup`) hold on a noisy machine even where the milliseconds drift. `round_done` is called after each.
    """
    protocol = protocol or Protocol()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with timing(), torch_threads(protocol.threads), torch.inference_mode():
        repeats = {name: _warm_up(call, protocol, clock) for name, call in candidates.items()}
        order = list(candidates)
        for _ in range(protocol.samples):
            for name in order:
                call, count = candidates[name], repeats[name]
                _lead(call, protocol, clock)
                start = clock()
                for _ in range(count):
                    call()
                samples[name].append((clock() - start) * 1e3 / count)
            order.reverse()
            round_done()
    return {name: Latency.from_samples(values, protocol.threads) for name, values in samples.items()}


def _lead(call: Callable[[], object], protocol: Protocol, clock: Clock) -> None:
    for _ in range(protocol.lead):
        call()
    if protocol.lead and protocol.threads > 1:
        end = clock() + SETTLE_MS / 1e3
        while clock() < end:
            call()


def _warm_up(call: Callable[[], object], protocol: Protocol, clock: Clock) -> int:
    fastest_ms = float("inf")
    for _ in range(max(1, protocol.warmup)):
        start = clock()
        call()
        fastest_ms = min(fastest_ms, (clock() - start) * 1e3)
    return max(1, min(1000, round(protocol.min_sample_ms / max(fastest_ms, 1e-4))))


def speedup(baseline: Latency, candidate: Latency) -> float:
    """How many times faster `candidate` is: the median of the per-round ratios of one `measure_together`."""
    pairs = zip(baseline.samples_ms, candidate.samples_ms, strict=True)
    return statistics.median(slow / max(fast, 1e-9) for slow, fast in pairs)
