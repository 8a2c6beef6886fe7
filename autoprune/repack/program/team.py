"""The threads that work on one inference together.

A call hands its work to the helpers that are idle and does its own part at once. It does not wait for a helper to come
or to leave: the work's items are taken from shared counters, and a helper that comes late finds none. So one whose last
call has returned is as good as idle: all it still needs is the interpreter's lock, which the next call gives up.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

Task = Callable[[int], None]


@dataclass(eq=False)
class _Call:
    """A task, and whether all of its work is done."""

    task: Task
    over: bool = False


class _Helper(threading.Thread):
    def __init__(self, number: int) -> None:
        super().__init__(name=f"autoprune-{number}", daemon=True)
        self.number = number
        self.last = _Call(lambda _: None, over=True)
        self.calls: SimpleQueue[_Call] = SimpleQueue()

    def give(self, call: _Call) -> None:
        self.last = call
        self.calls.put(call)

    def run(self) -> None:
        while True:
            self.calls.get().task(self.number)


class Team:
    """The caller and `size - 1` helpers."""

    def __init__(self, size: int) -> None:
        self._helpers = [_Helper(number) for number in range(1, size)]
        self._turn = threading.Lock()  # held while helpers are chosen
        for helper in self._helpers:
            helper.start()

    def call(self, task: Task, joined: Callable[[int], None]) -> None:
        """Runs ``task(0)`` here and ``task(number)`` on every helper that no other call keeps busy.

        Args:
            task: a thread's part of the work; returns when all of the work is done.
            joined: told, before any of them starts, how many helpers will run the task.
        """
        call = _Call(task)
        with self._turn:
            idle = [helper for helper in self._helpers if helper.last.over]
            joined(len(idle))
            for helper in idle:
                helper.give(call)
        try:
            task(0)
        finally:
            call.over = True


@cache
def _team(size: int, process: int) -> Team:
    return Team(size)


_LOCK = threading.Lock()


def team(size: int) -> Team:
    """This process's team of `size` threads; a forked process has its own."""
    with _LOCK:
        return _team(size, os.getpid())
