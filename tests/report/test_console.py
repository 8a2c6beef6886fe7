"""A terminal gets bars, a log gets few plain lines, and text comes out as it went in."""

from __future__ import annotations

import io
import re

import pytest

from autoprune.progress import Progress
from autoprune.report.console import Console


class Clock:
    """A clock that is set by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "CI", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def run_log(steps: int, step_s: float, total: int) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Console(stream, clock).bar("search", total) as bar:
        for step in range(steps):
            clock.now_s += step_s
            bar.advance(note=f"best {step}")
    return stream.getvalue().splitlines()


def test_a_quick_bar_leaves_one_line_in_a_log() -> None:
    assert run_log(steps=100, step_s=0.001, total=100) == ["search: 100/100 (100%) best 99"]


def test_a_log_gets_a_line_every_tenth() -> None:
    lines = run_log(steps=1000, step_s=0.1, total=1000)
    assert lines[0] == "search: 100/1000 (10%) best 99"
    assert len(lines) == 10


def test_a_line_comes_no_sooner_than_the_least_wait() -> None:
    lines = run_log(steps=10, step_s=0.9, total=10)
    assert lines[0].startswith("search: 3/10")
    assert len(lines) == 4
    assert lines[-1].startswith("search: 10/10 (100%)")


def test_a_slow_bar_shows_signs_of_life() -> None:
    assert len(run_log(steps=20, step_s=40.0, total=1000)) == 20


def test_an_unfinished_bar_claims_nothing() -> None:
    assert run_log(steps=5, step_s=0.1, total=100) == []


def test_a_bar_of_no_steps_is_silent() -> None:
    assert run_log(steps=0, step_s=1.0, total=0) == []


def test_text_comes_out_as_it_went_in() -> None:
    stream = io.StringIO()
    text = "layer[0] [bold] :smile: 12 " + "x" * 300
    Console(stream).say(text)
    assert stream.getvalue() == text + "\n"


def test_a_terminal_shows_nested_bars_and_is_left_clean(terminal: Terminal) -> None:
    console = Console(terminal)
    with console.bar("outer [1]", 2) as outer:
        for _ in range(2):
            with console.bar("inner", 3) as inner:
                inner.advance(3, note="[loss] 0.1")
                console.say("a line")
            outer.advance()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for text in ("outer [1]", "inner", "3/3", "[loss] 0.1"):
        assert text in shown
    assert shown.count("a line") == 2
    with console.bar("again", 1) as bar:
        bar.advance()
    assert "again" in terminal.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_error_inside_a_bar_comes_out(is_terminal: bool, terminal: Terminal) -> None:
    console: Progress = Console(terminal if is_terminal else io.StringIO())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), console.bar("outer", 1), console.bar("inner", 1):
            raise KeyboardInterrupt
