"""What other processes take of the machine while something is timed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE = (3, 4)  # of /proc/stat's first line: idle, and waiting for a disk; see proc_stat(5)
COUNTED = 8  # the fields after these, of guests, are parts of the first two


@dataclass
class Others:
    """Cores that other processes, or other machines on the same hardware, kept busy; none before the end."""

    cores: float = float("nan")


@contextmanager
def others() -> Iterator[Others]:
    """Measures, until it ends, what processes but this one and its ended children take (Linux)."""
    found, start, before = Others(), time.perf_counter(), _busy_s() - _own_s()
    yield found
    found.cores = max(0.0, _busy_s() - _own_s() - before) / (time.perf_counter() - start)


def _busy_s() -> float:
    """Seconds of processors, of all processes, since the machine started."""
    counts = [int(each) for each in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    return sum(count for at, count in enumerate(counts[:COUNTED]) if at not in IDLE) / TICKS_PER_S


def _own_s() -> float:
    return sum(os.times()[:4])
