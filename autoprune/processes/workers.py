"""Processes of this machine that compute one function of many items; they end with this process, whatever ends it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import cloudpickle

from autoprune.errors import AutopruneError, ConfigError
from autoprune.processes import worker_process

RETRIES = 2  # of an item whose worker died
if TYPE_CHECKING:
    Channel = connection.Connection[Any, Any]
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class _Worker:
    """A process, and this side of the pipe to it."""

    process: subprocess.Popen[bytes]
    channel: Channel

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # it died waiting: reading from it tells
            self.channel.send_bytes(data)

    def end(self) -> int:
        """Kills it and what it started; returns its status."""
        with suppress(ProcessLookupError, PermissionError):  # the whole group has ended
            if sys.platform == "win32":
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.channel.close()
        return self.process.wait()


class Workers(Generic[Item, Outcome]):
    """Items go to whichever worker is free; a worker that dies has its item given to another one.

    Workers are not forked: torch's threads do not survive it. They start with the first items. Each is sent the
    function once, as it is then, and imports what the function names, but not the script that runs here.

    Args:
        function: pickled by value where it has to be.
        count: at most so many processes.
        named: what an item is called in an error.
    """

    def __init__(self, function: Callable[[Item], Outcome], count: int, named: Callable[[Item], str] = str) -> None:
        self._function, self._count, self._named = function, count, named
        self._workers: list[_Worker] = []
        self._sent: bytes | None = None

    def as_done(self, items: Sequence[Item]) -> Iterator[tuple[int, Outcome]]:
        """Yields (index, outcome) in the order of completion; items begin in their own order.

        Raises:
            ConfigError: the function cannot be pickled.
            AutopruneError: an item's workers died again and again; or what the function raised.
        """
        done = False
        try:
            yield from self._spread(items)
            done = True
        finally:
            if not done:  # workers hold items that nobody waits for any more
                self.close()

    def _spread(self, items: Sequence[Item]) -> Iterator[tuple[int, Outcome]]:
        todo = deque(range(len(items)))
        deaths = dict.fromkeys(todo, 0)
        while len(self._workers) < min(self._count, len(items)):
            self._start()
        idle = list(self._workers)
        busy: dict[Channel, tuple[_Worker, int]] = {}
        while todo or busy:
            while todo and idle:
                worker, index = idle.pop(), todo.popleft()
                busy[worker.channel] = worker, index
                worker.send(pickle.dumps(items[index]))
            ready = connection.wait(list(busy))
            for channel in [channel for channel in busy if channel in ready]:
                worker, index = busy.pop(channel)
                try:
                    well, outcome = channel.recv()
                except (EOFError, OSError):
                    self._workers.remove(worker)
                    status = worker.end()
                    deaths[index] += 1
                    if deaths[index] > RETRIES:
                        raise AutopruneError(_deadly(self._named(items[index]), deaths[index], status)) from None
                    todo.appendleft(index)
                    idle.append(self._start())
                    continue
                idle.append(worker)
                if not well:
                    raise outcome
                yield index, outcome

    def _start(self) -> _Worker:
        if self._sent is None:
            self._sent = _pickled(self._function)
        ours, theirs = Pipe()
        with theirs:
            worker = _Worker(_launched(theirs.fileno()), ours)
        self._workers.append(worker)
        worker.send(pickle.dumps(sys.path))
        worker.send(self._sent)
        return worker

    def close(self) -> None:
        """Kills the workers, whatever they are doing; later items start new ones."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._sent = None


def _launched(handle: int) -> subprocess.Popen[bytes]:
    # -P: the script's folder is none to import from.
    command = [sys.executable, "-P", str(Path(worker_process.__file__)), str(handle), str(os.getpid())]
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    # A group of its own: it can be killed with all that it starts, and Ctrl-C is ours alone.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(handle,), process_group=0)


def _pickled(function: Callable[[Any], Any]) -> bytes:
    try:
        sent: bytes = cloudpickle.dumps(function)
    except Exception as error:  # what may be wrong with a user's objects is without end
        raise ConfigError(
            f"the task cannot be sent to other processes ({error}). Use one worker (--workers 1), or give a model and "
            "data that can be pickled."
        ) from error
    return sent


@cache
def end_forks_with_this() -> None:
    """What this process forks from here on, such as a DataLoader's workers, ends with it, whatever ends it.

    torch's own watch takes five seconds, in which a run that is started again is refused: a lock is inherited, too.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_note_parent, after_in_child=_watch_parent)


_forking = 0  # the process that forks, for the child: to whom it may be lost before it can ask


def _note_parent() -> None:
    global _forking
    _forking = os.getpid()


def _watch_parent() -> None:
    threading.Thread(target=_end_with, args=(_forking,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(worker_process.LOOK_S)
    os._exit(1)


def _deadly(name: str, deaths: int, status: int) -> str:
    return (
        f"{deaths} workers died on the same work, the last with status {status} (-9: killed, perhaps for memory; else "
        f"see what it wrote above). Use fewer workers (--workers). The work: {name}"
    )
