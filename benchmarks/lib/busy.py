"""A machine that does something else, too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def busy_core(busy: bool) -> Iterator[None]:
    """Another process that computes all the time, if asked for."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"]) as process:
        try:
            yield
        finally:
            process.kill()
