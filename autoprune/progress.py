"""Where long work reports to: silent by default, a console for the command line (`autoprune.report.console`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """One progress bar; this one shows nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Moves on by `steps`; `note` is a short text beside the bar."""


class Progress:
    """A silent reporter and the interface of the loud ones."""

    def say(self, text: str) -> None:
        """Prints one plain line (or block) of the log."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A progress bar over `total` steps for the time of the block."""
        yield Bar()


SILENT = Progress()


def counted(count: float, things: str) -> str:
    """So many things as people read it; their plural ends in an s of its first word: ``1 point of accuracy``."""
    first, space, rest = things.partition(" ")
    return f"{count:g} {first.removesuffix('s') if count == 1 else first}{space}{rest}"
