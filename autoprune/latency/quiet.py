"""Who may compute while somebody times: one lock a machine and user, so that neighbours do not disturb a timing.

Scoring holds the lock together with others, timing holds it alone. A timing therefore waits until the scorings under
way are done, and none begins before it is: that is the price. Only runs of this user, with the same cache folder, know
of each other. Where there are no such locks (not POSIX, a folder that cannot be written) nobody waits.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from autoprune.errors import FileError
from autoprune.files import cache_folder

if sys.platform != "win32":
    import fcntl

PATIENCE_S = 60.0  # of a wait, before it is told
_LOG = logging.getLogger(__name__)


class _Held(threading.local):
    """What this thread holds: threads exclude one another like processes do."""

    lock: _Lock | None = None
    alone = False


_held = _Held()


class _Lock:
    """Two lock files: the lock itself, and a turn that is taken before waiting for it.

    Without the turn, those who share the lock could follow each other for ever while one waits to be alone.
    """

    def __init__(self) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # The host's name: a home folder may be shared by machines that do not disturb each other.
        stem = folder / f"timing-{platform.node()}"
        self._turn, self._lock = (_opened(f"{stem}.{name}") for name in ("turn", "lock"))

    def take(self, alone: bool) -> None:
        """Waits for the lock; one that is held already is given up and taken anew."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        _lock(self._turn, fcntl.LOCK_EX)
        try:
            _lock(self._lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the lock up; so does the end of the process, whatever ends it."""
        os.close(self._turn)
        os.close(self._lock)


def _lock(file: int, how: int) -> None:
    """Waits for a lock, and says so when that takes long: a run that was suspended gives nothing back."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        said = threading.Timer(
            PATIENCE_S,
            _LOG.warning,
            ("still waiting for another autoprune run, so that timings are not disturbed: is one suspended?",),
        )
        said.daemon = True
        said.start()
        try:
            fcntl.flock(file, how)
        finally:
            said.cancel()


def _opened(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextmanager
def working() -> Iterator[None]:
    """Work that would disturb a timing, beside others' work. Within `timing` it is part of the timing."""
    with _taken(alone=False):
        yield


@contextmanager
def timing() -> Iterator[None]:
    """Nobody else works or times. Within `working`, the work makes way for the timing and goes on after it."""
    with _taken(alone=True):
        yield


@contextmanager
def _taken(alone: bool) -> Iterator[None]:
    if _held.alone or (_held.lock is not None and not alone):
        yield  # held already
        return
    with ExitStack() as after:
        if _held.lock is not None:
            after.callback(_held.lock.take, False)
            _held.lock.take(True)
        elif (lock := _free_lock()) is not None:
            after.callback(lock.close)
            lock.take(alone)
            after.callback(setattr, _held, "lock", None)
            _held.lock = lock
        after.callback(setattr, _held, "alone", False)
        _held.alone = alone
        yield


def _free_lock() -> _Lock | None:
    if sys.platform == "win32":
        return None
    try:
        return _Lock()
    except (OSError, FileError):
        return None
