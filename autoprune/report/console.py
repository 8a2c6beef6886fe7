"""Progress for people: bars on a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from autoprune.progress import Bar, Progress

LINE_EVERY = 0.1  # of a bar's steps, in a log
LINE_AFTER_S = 2.0  # but no sooner than this
LINE_ANYWAY_S = 30.0  # and no later than this, if there is anything new


class Console(Progress):
    """Reports to `stream` (stderr: standard output is for results).

    Args:
        stream: None takes ``sys.stderr`` of the moment.
        clock: seconds, monotonic; paces the lines of a log.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = rich.console.Console(file=stream or sys.stderr)
        self._clock = clock
        self._live: RichProgress | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        if not self._console.is_terminal:
            yield _Lines(self.say, title, total, self._clock)
        elif self._live is not None:
            yield from self._task(self._live, title, total)
        else:
            with self._new_live() as self._live:
                try:
                    yield from self._task(self._live, title, total)
                finally:
                    self._live = None

    def _new_live(self) -> RichProgress:
        """One display for all the bars that are open: a terminal has one bottom line to redraw."""
        return RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )

    def _task(self, live: RichProgress, title: str, total: int) -> Iterator[Bar]:
        task = live.add_task(title, total=total, note="")
        try:
            yield _Task(live, task)
            live.refresh()  # a bar that ends is seen full
        finally:
            live.remove_task(task)


class _Task(Bar):
    """One bar of the terminal's display."""

    def __init__(self, live: RichProgress, task: TaskID) -> None:
        self._live, self._task = live, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._live.update(self._task, advance=steps, note=note)


class _Lines(Bar):
    """A bar in a log: now and then a line, and always one at the end."""

    def __init__(self, say: Callable[[str], None], title: str, total: int, clock: Callable[[], float]) -> None:
        self._say, self._title, self._total, self._clock = say, title, total, clock
        self._done = self._told = 0
        self._told_s = clock()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now_s = self._clock()
        waited_s = now_s - self._told_s
        enough = self._done - self._told >= LINE_EVERY * self._total and waited_s >= LINE_AFTER_S
        finished = self._done >= self._total > self._told
        if enough or finished or waited_s >= LINE_ANYWAY_S:
            self._told, self._told_s = self._done, now_s
            share = f"{100 * self._done / max(1, self._total):.0f}%"
            self._say(f"{self._title}: {self._done}/{self._total} ({share})" + (f" {note}" if note else ""))
