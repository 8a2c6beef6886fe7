"""Nobody works while somebody times; those who work share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from autoprune.latency import quiet
from autoprune.latency.quiet import timing, working
from autoprune.latency.timer import Protocol, measure_together

Taken = Callable[[], AbstractContextManager[None]]
SOON_S, LONG_S = 0.2, 20.0


class Neighbour:
    """A thread that takes the lock and holds it until it is told to end."""

    def __init__(self, take: Taken) -> None:
        self.has, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._hold, args=(take,))
        self.thread.start()

    def _hold(self, take: Taken) -> None:
        with take():
            self.has.set()
            self.over.wait(LONG_S)

    @property
    def waits(self) -> bool:
        return not self.has.wait(SOON_S)

    @property
    def got_it(self) -> bool:
        return self.has.wait(LONG_S)

    def end(self) -> None:
        self.over.set()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Taken], Neighbour]]:
    """Makes neighbours, and ends them after the test has given back what it holds."""
    made: list[Neighbour] = []

    def make(take: Taken) -> Neighbour:
        made.append(Neighbour(take))
        return made[-1]

    yield make
    for neighbour in made:
        neighbour.over.set()
    for neighbour in made:
        neighbour.end()


Elsewhere = Callable[[Taken], Neighbour]


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [(working, working, False), (working, timing, True), (timing, working, True), (timing, timing, True)],
)
def test_who_waits_for_whom(first: Taken, second: Taken, waits: bool, elsewhere: Elsewhere) -> None:
    holder = elsewhere(first)
    assert holder.got_it
    follower = elsewhere(second)
    assert follower.waits if waits else follower.got_it
    holder.end()
    assert follower.got_it


def test_a_timing_within_work_waits_for_other_work_and_the_work_goes_on_after_it(elsewhere: Elsewhere) -> None:
    with working():
        with timing(), timing(), working():
            worker = elsewhere(working)
            assert worker.waits
        assert worker.got_it
        worker.end()
        timer = elsewhere(timing)
        assert timer.waits, "the work goes on"
        with working():
            pass
        assert timer.waits, "an inner end is no end"
    assert timer.got_it


def test_those_who_share_do_not_keep_a_timing_waiting_for_ever(elsewhere: Elsewhere) -> None:
    first = elsewhere(working)
    assert first.got_it
    timer = elsewhere(timing)
    assert timer.waits
    latecomer = elsewhere(working)
    assert latecomer.waits, "it comes after the timing"
    first.end()
    assert timer.got_it
    assert latecomer.waits
    timer.end()
    assert latecomer.got_it


def test_an_error_gives_the_lock_back(elsewhere: Elsewhere) -> None:
    with pytest.raises(ValueError, match="x"), timing():
        raise ValueError("x")
    assert elsewhere(timing).got_it


def test_what_is_timed_in_turns_is_timed_alone(elsewhere: Elsewhere) -> None:
    neighbours: list[Neighbour] = []

    def call() -> None:
        if not neighbours:
            neighbours.append(elsewhere(working))
            assert neighbours[0].waits

    measure_together({"call": call}, Protocol(samples=2, warmup=1, min_sample_ms=0.0))
    assert neighbours[0].got_it


def test_without_a_folder_to_write_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Elsewhere
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "file"))
    with timing():
        assert elsewhere(timing).got_it


def test_a_long_wait_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, elsewhere: Elsewhere
) -> None:
    monkeypatch.setattr(quiet, "PATIENCE_S", 0.05)
    suspended = elsewhere(working)
    assert suspended.got_it
    timer = elsewhere(timing)
    assert timer.waits
    assert "is one suspended?" in caplog.text
    suspended.end()
    assert timer.got_it
