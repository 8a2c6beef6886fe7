"""Runs a command for a program, and ends it with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from autoprune.errors import DeviceError

FILE = "{file}"  # in a command: the program that it runs
SAID = 600  # characters of what a command said, in an error
_SIGNALS = {int(signal.SIGILL): "an illegal instruction: the target asks for more than the device's processor has"}


def output_of(run: str, command: Sequence[str], program: Path, timeout_s: float) -> str:
    """Standard output of a command for a program.

    Args:
        run: the command as it was given, for errors.
        command: its words; `FILE` in one is the program's path.
        program: that it runs.
        timeout_s: how long it may take, seconds.

    Raises:
        DeviceError: it could not be started, failed, or took too long.
    """
    words = [word.replace(FILE, str(program)) for word in command]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError:
        raise DeviceError(
            f"the device's command was not found: {words[0]!r} of device.run = {run!r}. Install it, or give its path."
        ) from None
    except OSError as error:
        raise DeviceError(
            f"the device's command cannot be run: {words[0]!r} of device.run = {run!r} ({error.strerror}). "
            "Is it a program for this machine, and executable?"
        ) from None
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"the device did not answer in {timeout_s:g} s: {run!r} was ended. Is it there? What was "
            "measured before is kept, and the same command goes on from there. device.timeout_s allows more time."
        ) from None
    finally:
        _end(process)
    if process.returncode:
        raise DeviceError(_failed(run, process.returncode, (err or out).decode(errors="replace")))
    return out.decode(errors="replace")


def _failed(run: str, status: int, said: str) -> str:
    caught = -status if status < 0 else status - 128  # as shells and emulators tell it
    why = _SIGNALS.get(caught, "")
    text = " ".join(said.split())[-SAID:]
    return (
        f"the device failed: {run!r} ended with status {status}{f' ({why})' if why else ''}"
        f"{f', saying: {text}' if text else ''}. What was measured before is kept: once the device is there again, "
        "the same command goes on from there."
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and whatever it started: none of it is to disturb the next timing."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
