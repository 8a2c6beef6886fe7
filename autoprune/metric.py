"""What a task's score is called and how it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from autoprune.errors import ConfigError, NumericalError
from autoprune.progress import counted

_ROUNDING = 1e-6  # that a mean in float32 may be out of its range by


@dataclass(frozen=True)
class Metric:
    """The figure that people read in place of a score.

    A score is higher when better, whatever the metric; a drop is the dense model's score less another's. Searches and
    targets know scores and drops alone.

    Attributes:
        name: of the figure, e.g. ``accuracy``: heads a column.
        factor: the figure is `factor` times the score; below 0 where lower figures are better.
        unit: stands right behind the figure, e.g. ``%``.
        digits: behind the figure's point.
        points: what differences of figures are counted in, e.g. ``points of accuracy``.
        lowest: no score is below it; likewise `highest`.
    """

    name: str
    factor: float
    unit: str
    digits: int
    points: str
    lowest: float = -math.inf
    highest: float = math.inf

    def __post_init__(self) -> None:
        if self.factor == 0:
            raise ConfigError(f"the factor of the metric {self.name!r} must not be 0: every figure would be 0.")

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def tag(self) -> str:
        """In TensorBoard, which takes no spaces."""
        return self.name.replace(" ", "_")

    def score(self, given: Any) -> float:
        """The score that an evaluation returned: a number of any kind, or a dictionary with one at the metric's name.

        Raises:
            NumericalError: it is none, not finite, or out of the metric's range.
        """
        score = returned(given, self.name)
        nearest = min(max(score, self.lowest), self.highest)
        if not math.isclose(score, nearest, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            raise NumericalError(
                f"evaluate returned {score:.16g}, but a score of the metric {self.name!r} is from {self.lowest:g} to "
                f"{self.highest:g}: return it in that range (a fraction, not a percentage), or give the metric that it "
                "is of (metric=autoprune.Metric(...))."
            )
        return nearest

    def figure(self, score: float) -> float:
        return self.factor * score

    def text(self, score: float) -> str:
        """The figure with its unit, e.g. ``98.12%``."""
        return f"{self.figure(score):.{self.digits}f}{self.unit}"

    def describe(self, score: float) -> str:
        """The figure in a sentence, e.g. ``accuracy 98.12%``."""
        return f"{self.name} {self.text(score)}"

    def change(self, drop: float) -> str:
        """A drop in a sentence, e.g. ``0.30 points of accuracy worse``; below 0 it is a gain."""
        points = abs(self.factor * drop)
        return f"{points:.{self.digits}f} {self.points} {'worse' if drop > 0 else 'better'}"

    def allowance(self, drop: float) -> str:
        """A drop as it was asked for, e.g. ``2 points of accuracy``."""
        return counted(round(abs(self.factor) * drop, 12), self.points)


def returned(given: Any, name: str) -> float:
    """The finite number that an evaluation returned, of any kind, or in a dictionary at `name`.

    Raises:
        NumericalError: it is none, or not finite.
    """
    value = number(given[name] if isinstance(given, Mapping) and name in given else given)
    if value is None:
        raise NumericalError(
            f"evaluate must return one number, higher when better, or a dictionary with one at {name!r}; it "
            f"returned {_describe(given)}."
        )
    if not math.isfinite(value):
        raise NumericalError(f"evaluate returned {value}, which is no score: it must be a finite number.")
    return value


def number(value: Any) -> float | None:
    """A number of any kind, such as a tensor or an array with one in it; None where it is none."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
        try:
            value = None if np.ma.is_masked(value) else value.item()
        except RuntimeError:  # of a tensor without values
            return None
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:  # of a Decimal that signals
        return math.nan


def _describe(given: Any) -> str:
    """What was returned, for a message."""
    if given is None:
        return "None (is there a return missing?)"
    if isinstance(given, Mapping):
        return f"a dictionary with {', '.join(map(repr, given)) or 'nothing in it'}"
    if isinstance(given, (Tensor, np.ndarray)):
        return f"a {type(given).__name__} of shape {tuple(given.shape)}"
    return f"{given!r:.60}, a {type(given).__name__}"


ACCURACY = Metric("accuracy", factor=100.0, unit="%", digits=2, points="points of accuracy", lowest=0.0, highest=1.0)
BITS_PER_CHARACTER = Metric(
    "bits per character", factor=-1.0, unit="", digits=4, points="bits per character", highest=0.0
)
