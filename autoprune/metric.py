"""What a task's score is called and how it reads."""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.errors import ConfigError


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
    """

    name: str
    factor: float
    unit: str
    digits: int
    points: str

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

    def figure(self, score: float) -> float:
        return self.factor * score

    def text(self, score: float) -> str:
        """The figure with its unit, e.g. ``98.12%``."""
        return f"{self.figure(score):.{self.digits}f}{self.unit}"

    def said(self, score: float) -> str:
        """The figure in a sentence, e.g. ``accuracy 98.12%``."""
        return f"{self.name} {self.text(score)}"

    def change(self, drop: float) -> str:
        """A drop in a sentence, e.g. ``0.30 points of accuracy worse``; below 0 it is a gain."""
        points = abs(self.factor * drop)
        return f"{points:.{self.digits}f} {self.points} {'worse' if drop > 0 else 'better'}"

    def allowance(self, drop: float) -> str:
        """A drop as it was asked for, e.g. ``2 points of accuracy``."""
        return f"{abs(self.factor) * drop:g} {self.points}"


ACCURACY = Metric("accuracy", factor=100.0, unit="%", digits=2, points="points of accuracy")
BITS_PER_CHARACTER = Metric("bits per character", factor=-1.0, unit="", digits=4, points="bits per character")
