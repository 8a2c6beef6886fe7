"""One at a time: a folder that a process writes in is its own while it does, and what several make they make in turn.

Locks are of the system (flock): they end with whoever holds them, however that ends. A folder that cannot be written
needs none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from autoprune.errors import AutopruneError, InUse
from autoprune.files import on_disk, remove_unfinished

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"
PATIENCE_S = 10.0  # with a dead holder: what it started (a DataLoader's workers) holds the lock for some seconds more
_LOOK_S = 0.1
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LOG = logging.getLogger(__name__)


@dataclass
class _Held:
    """A folder's lock: the open file, the process and the thread it is held by, and how often it is taken."""

    file: int
    process: int
    thread: threading.Thread
    count: int


_folders: dict[Path, _Held] = {}
_guard = threading.RLock()  # a collected lock is given back wherever the collector runs


class FolderLock:
    """A folder that one thread of one process writes in; the same thread may hold several of one folder.

    Args:
        folder: made when it is taken; one that cannot be written is nobody's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._give_back: weakref.finalize[[Path], FolderLock] | None = None

    def take(self) -> None:
        """Holds the folder until `close`, or as long as this object lives. What killed processes left is removed.

        Raises:
            InUse: another process, or another thread of this one, has it.
        """
        if self._give_back is None or not self._give_back.alive:
            whole = self._folder.resolve()
            with _guard:
                _take_folder(self._folder, whole)
            self._give_back = weakref.finalize(self, _give_back, whole)

    @contextmanager
    def or_in_use(self) -> Iterator[None]:
        """For a look at the folder: while another one works in it, what is found there says less than that.

        Raises:
            InUse: in place of an error of the block, where `take` would raise it; nothing is taken or changed.
        """
        try:
            yield
        except AutopruneError:
            with _guard:
                _check_free(self._folder, self._folder.resolve())
            raise

    def close(self) -> None:
        """Gives the folder back; so does the end of the process."""
        if self._give_back is not None:
            self._give_back()


def _take_folder(folder: Path, whole: Path) -> None:
    held = _folders.get(whole)
    if held is not None and held.process == os.getpid():  # else it is of the process that forked this one
        here = threading.current_thread()
        if held.thread is not here and held.thread.is_alive():
            raise InUse(_refusal(folder, f"another thread of this process ({held.thread.name})"))
        held.thread = here
        held.count += 1
    elif (file := _writable(folder / NAME)) is not None:
        _take(file, folder)
        _folders[whole] = _Held(file, os.getpid(), threading.current_thread(), 1)
        remove_unfinished(folder)


def _check_free(folder: Path, whole: Path) -> None:
    held = _folders.get(whole)
    if held is not None and held.process == os.getpid():
        if held.thread is not threading.current_thread() and held.thread.is_alive():
            raise InUse(_refusal(folder, f"another thread of this process ({held.thread.name})"))
        return
    try:
        file = os.open(folder / NAME, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # nobody has ever taken it, or nobody can tell
        return
    try:
        if not _locked(file) and _alive(holder := _holder(file)):
            raise InUse(_refusal(folder, _said(holder)))
    finally:
        os.close(file)  # and with it the lock


def _give_back(whole: Path) -> None:
    with _guard:
        held = _folders.get(whole)
        if held is None or held.process != os.getpid():
            return
        held.count -= 1
        if not held.count:
            os.close(held.file)
            del _folders[whole]


def _take(file: int, folder: Path) -> None:
    """Locks a folder's file, or raises InUse and closes it."""
    end = time.monotonic() + PATIENCE_S
    while not _locked(file):
        holder = _holder(file)
        if _alive(holder) or time.monotonic() > end:
            os.close(file)
            raise InUse(_refusal(folder, _said(holder)))
        time.sleep(_LOOK_S)
    _sign(file)


@contextmanager
def turn(path: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Waits until nobody else makes `path`, and lets nobody begin meanwhile.

    Args:
        path: a file that may be there afterwards: look again.
        say: is told who is waited for.
    """
    lock = path.with_name(f".{path.name}.lock")
    while (file := _writable(lock)) is not None:
        if not _locked(file):
            say(f"waiting for {_said(_holder(file))}, which is making {path}")
            while not _locked(file):
                time.sleep(_LOOK_S)
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                break
        os.close(file)  # who held it has removed it
    try:
        if file is not None:
            _sign(file)
            remove_unfinished(path.parent, path.name)
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # Windows removes no open file
                lock.unlink()
            os.close(file)


def _writable(path: Path) -> int | None:
    """The lock file, opened; None where nothing can be written, so that there is nothing to keep others from."""
    flags = os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    with on_disk(path, "locked"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(path, os.O_RDWR | flags, 0o666)
            except PermissionError:  # another user's
                return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno in _UNWRITABLE or isinstance(error, FileNotFoundError):
                return None
            raise


def _locked(file: int) -> bool:
    """Takes the lock if it is free."""
    try:
        if sys.platform == "win32":
            os.lseek(file, 1 << 30, os.SEEK_SET)  # what is locked cannot be read: the text stays readable
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            _LOG.warning("the file system has no locks (%s): let no other autoprune write there.", error)
            return True
        return False
    return True


def _sign(file: int) -> None:
    """Says in the lock file who holds it."""
    text = json.dumps({"pid": os.getpid(), "host": platform.node()}).encode()
    with suppress(OSError):  # another user's, or no space: the lock holds all the same
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, text)


def _holder(file: int) -> tuple[int, str] | None:
    """Process and host that hold a lock; None where they did not say so (yet)."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        data = json.loads(os.read(file, 1000))
        return int(data["pid"]), str(data["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _alive(holder: tuple[int, str] | None) -> bool:
    if holder is None:
        return False
    process, host = holder
    if host != platform.node() or sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _said(holder: tuple[int, str] | None) -> str:
    return "another process" if holder is None else f"process {holder[0]} on {holder[1]}"


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"{folder} is in use by {holder}: two at once would spoil what is kept there. Wait until that has ended, or "
        "end it and give the same command again; or take another directory (--run-dir)."
    )
