"""When a method cuts, and how much of the plan it has reached by then."""

from __future__ import annotations

import math

from autoprune.checks import check_numbers
from autoprune.errors import ConfigError

CUBIC = 3.0


def rise(progress: float, exponent: float = CUBIC) -> float:
    """The fraction of the plan's sparsities at `progress` through the cutting, which is cut to [0, 1].

    An exponent of 1 rises evenly, 3 is the cubic, more cuts earlier still.
    """
    return 1.0 - float((1.0 - min(1.0, max(0.0, progress))) ** exponent)


def cutting_steps(begin: float, end: float, total_steps: int) -> tuple[int, int]:
    """The steps after which cutting begins and by which it is done; at least one apart, the first within the run."""
    first = min(math.floor(begin * total_steps), total_steps - 1)
    return first, max(first + 1, math.floor(end * total_steps))


def cuts(begin: float, end: float, updates: int, total_steps: int, exponent: float = CUBIC) -> dict[int, float]:
    """The steps at which masks are made -> the fraction of the plan's sparsities then (Zhu and Gupta 2017).

    Args:
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the plan is reached, in (begin, 1].
        updates: how often masks are made, evenly spaced, >= 1.
        total_steps: of the run, counted from 1; the last of the returned steps has fraction 1.
        exponent: of `rise`.
    """
    first, last = cutting_steps(begin, end, total_steps)
    steps = {first + math.ceil((last - first) * i / updates) for i in range(1, updates + 1)}
    return {step: rise((step - first) / (last - first), exponent) for step in sorted(steps)}


def check_span(method: str, begin: float, end: float, freeze: float = 1.0) -> None:
    """Raises ConfigError unless 0 <= begin < end <= freeze <= 1."""
    if not 0.0 <= begin < end <= 1.0:
        raise ConfigError(f"training method {method!r} needs 0 <= begin < end <= 1, not begin={begin}, end={end}.")
    check_numbers(f"training method {method!r}", {"freeze": freeze}, end, 1.0)
