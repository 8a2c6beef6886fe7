"""Ending a process that was told to stop as Ctrl-C ends it: what it has open is closed, its temporary folders go."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_SIGNALS = ("SIGTERM", "SIGHUP")  # of `kill`, a scheduler or a shutdown; of a terminal that closes
STATUSES = {128 + getattr(signal, name): name for name in _SIGNALS if hasattr(signal, name)}
"""The exit status after each signal, as shells give it -> its name."""


def unwind_on_signals() -> None:
    """Makes these signals raise SystemExit in this process, once: a second one ends it where it stands.

    Left alone by default they end a process at once, and its temporary folders stay behind. A signal that is ignored,
    as by nohup, or handled already stays so. What this process forks gets the default back.
    """
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _unwind)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_as_by_default)


def _unwind(number: int, frame: FrameType | None) -> None:
    _as_by_default()
    sys.exit(128 + number)


def _as_by_default() -> None:
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) is _unwind:
            signal.signal(number, signal.SIG_DFL)
