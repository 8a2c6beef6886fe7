"""Checks of arguments, which come from configs, files and users' code."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Literal

from autoprune.errors import ConfigError

Ends = Literal["[]", "(]", "[)", "()"]


def check_flags(owner: str, flags: Mapping[str, object]) -> None:
    """Raises ConfigError on what is neither true nor false.

    Args:
        owner: whose arguments they are, as messages begin: ``pattern 'group'``.
        flags: name -> value.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise _error(owner, name, "true or false", flag)


def check_counts(owner: str, counts: Mapping[str, object], least: int = 1, most: int | None = None) -> None:
    """Raises ConfigError on what is not an integer from `least` to `most`, or without end where that is None.

    Args:
        owner: as for `check_flags`.
        counts: name -> value.
        least: the lowest allowed.
        most: the highest allowed.
    """
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if not whole or count < least or (most is not None and count > most):  # type: ignore[operator]
            allowed = f">= {least}" if most is None else f"from {least} to {most}"
            raise _error(owner, name, f"an integer {allowed}", count)


def check_numbers(
    owner: str, numbers: Mapping[str, object], low: float, high: float = math.inf, ends: Ends = "[]"
) -> None:
    """Raises ConfigError on what is not a finite number in the interval from `low` to `high`.

    Args:
        owner: as for `check_flags`.
        numbers: name -> value.
        low: the lowest allowed.
        high: the highest allowed.
        ends: whether these two are allowed themselves, as intervals are written: ``(]`` leaves out `low`.
    """
    for name, number in numbers.items():
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not real or not _within(number, low, high, ends):  # type: ignore[arg-type]
            sign = ">=" if ends[0] == "[" else ">"
            interval = f"{sign} {low:g}" if high == math.inf else f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
            raise _error(owner, name, f"a number {interval}", number)


def _within(number: float, low: float, high: float, ends: Ends) -> bool:
    above = low <= number if ends[0] == "[" else low < number
    below = number <= high if ends[1] == "]" else number < high
    return above and below and number < math.inf  # NaN is neither


def _error(owner: str, name: str, allowed: str, given: object) -> ConfigError:
    return ConfigError(f"{owner}: {name} must be {allowed}, not {reprlib.repr(given)}.")
