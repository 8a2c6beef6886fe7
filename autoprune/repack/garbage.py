"""Full collections of garbage, each of which walks through all that lives in the process: put off while we work.

Capturing and compiling make millions of small objects, which Python answers with full collections: with torch and a
model library loaded each takes up to half a second, and frees next to nothing. Young garbage is collected all the same.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 2**31 - 1  # the largest threshold there is
_LOCK = threading.Lock()
_working = 0
_before = 0


@contextmanager
def without_full_collections() -> Iterator[None]:
    """While any thread is within, Python begins no full collection by itself; what others set meanwhile stays."""
    global _working, _before  # the collector is the process's
    with _LOCK:
        _working += 1
        first, second, third = gc.get_threshold()
        if _working == 1 and third:
            _before = third
            gc.set_threshold(first, second, NEVER)
    try:
        yield
    finally:
        with _LOCK:
            _working -= 1
            first, second, third = gc.get_threshold()
            if not _working and third == NEVER and _before:
                gc.set_threshold(first, second, _before)
