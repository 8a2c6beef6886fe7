"""The threads that work on one inference together.

A call hands its work to the helpers that are free and does its own part at once. It does not wait for a helper to come
or to leave: the work's items are taken from shared counters, and a helper that comes late finds none. A helper looks
out for its next call in native code, where neither it nor the caller needs the interpreter's lock; only one that has
long had nothing to do goes to sleep.
"""

from __future__ import annotations

import atexit
import os
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np

from autoprune.repack.runtime.job_slot import SIZE, TAKEN, give, serve

Job = tuple[int, int, int, int, int]
"""Table, ops, slots, counters, threads: see NativeSequence.job."""


@dataclass(frozen=True)
class Ticket:
    """A helper's part in a call."""

    helper: Helper
    number: int

    @property
    def over(self) -> bool:
        """Whether the helper is through with it, and looks at none of the call's memory any more."""
        return self.helper.through >= self.number

    def forget(self) -> None:
        """Lets go of what the call kept, if it is over."""
        self.helper.forget(self.number)


class Helper(threading.Thread):
    """Thread `number` of a team."""

    def __init__(self, number: int) -> None:
        super().__init__(name=f"autoprune-{number}", daemon=True)
        self.number = number
        self._box = np.zeros(SIZE, np.int64)
        self._address = self._box.ctypes.data
        self._given = 0
        self._kept: object = None
        self._wake = threading.Semaphore(0)
        self._stopping = False

    @property
    def through(self) -> int:
        """Jobs done."""
        return int(self._box[TAKEN])

    def join_in(self, job: Job, keep: object) -> Ticket | None:
        """Gives it a job, which needs `keep` to live; None when it is busy with another."""
        if self.through < self._given:
            return None
        self._kept = keep
        self._given += 1
        if give(self._address, *job):
            self._wake.release()
        return Ticket(self, self._given)

    def forget(self, number: int) -> None:
        if self.through == self._given == number:
            self._kept = None

    def run(self) -> None:
        while not self._stopping:
            serve(self._address, self.number)
            self._wake.acquire()

    def stop(self) -> None:
        """Waits until it is out of native code, whose memory the interpreter frees at its end."""
        self._stopping = True
        self._wake.release()
        self.join(timeout=1.0)


class Team:
    """The caller and `size - 1` helpers."""

    def __init__(self, size: int) -> None:
        self.helpers = [Helper(number) for number in range(1, size)]
        self._turn = threading.Lock()  # held while a job is handed out
        for helper in self.helpers:
            helper.start()
        atexit.register(self._stop)

    def join_in(self, job: Job, keep: object) -> list[Ticket]:
        """Gives every free helper its part of a job, which needs `keep` to live."""
        with self._turn:
            tickets = [helper.join_in(job, keep) for helper in self.helpers]
        return [ticket for ticket in tickets if ticket is not None]

    def _stop(self) -> None:
        for helper in self.helpers:
            helper.stop()


@cache
def _team(size: int, process: int) -> Team:
    return Team(size)


_LOCK = threading.Lock()


def team(size: int) -> Team:
    """This process's team of `size` threads; a forked process has its own."""
    with _LOCK:
        return _team(size, os.getpid())
