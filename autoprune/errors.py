"""Errors a user can act on: what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutopruneError(Exception):
    """A mistake in what was asked for. The command line prints it as one paragraph and exits with 2."""


class ConfigError(AutopruneError):
    """A config file or an override that cannot be used."""


class FileError(AutopruneError):
    """A file that is missing, corrupt, or of another version."""


class InfeasibleTarget(AutopruneError):
    """A target no plan can reach; the message carries the best reachable figure."""


class StaleTable(AutopruneError):
    """A latency table measured elsewhere, or under other settings, than it would be used."""


class DeviceError(AutopruneError):
    """A device that latency is measured on failed, is not there, or cannot run what it is given."""


class NumericalError(AutopruneError):
    """Numbers nothing can be done with: a training that diverged, a score that is none. One ends a trial, no search."""


class GivenError(AutopruneError):
    """What a user gave failed while it was used: a function of his, or a batch. In a trial it ends that, no search."""


class InUse(AutopruneError):
    """A directory that another process, or another thread, is writing in."""


class MissingExtra(AutopruneError):
    """An optional dependency that is not installed; the message carries the command."""


def first_line(error: BaseException) -> str:
    """An error's first line; "" where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns a hint such as ``Did you mean 'group'? Allowed: channel, group.``."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Allowed: {', '.join(names)}."
