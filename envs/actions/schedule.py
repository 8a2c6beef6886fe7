"""Run actions: when the training method cuts, how fast, and how often."""

from __future__ import annotations

from typing import ClassVar

from autoprune.envs.actions.method_argument import MethodNumber


class ScheduleBegin(MethodNumber):
    """The fraction of the run after which cutting begins; keep it below every `schedule_end`."""

    arguments: ClassVar[tuple[str, ...]] = ("begin",)
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, low: float = 0.0, high: float = 0.2) -> None:
        super().__init__(low, high)


class ScheduleEnd(MethodNumber):
    """The fraction of the run at which the whole budget is met."""

    arguments: ClassVar[tuple[str, ...]] = ("end",)
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, low: float = 0.25, high: float = 0.6) -> None:
        super().__init__(low, high)


class ScheduleExponent(MethodNumber):
    """The exponent of the rise between the two: 1 is even, 3 cubic, more cuts earlier."""

    arguments: ClassVar[tuple[str, ...]] = ("exponent",)
    limits: ClassVar[tuple[float, float]] = (0.1, 10.0)
    log: ClassVar[bool] = True

    def __init__(self, low: float = 1.0, high: float = 8.0) -> None:
        super().__init__(low, high)


class ScheduleRounds(MethodNumber):
    """How often the masks are made anew between the two."""

    arguments: ClassVar[tuple[str, ...]] = ("updates", "rounds")
    limits: ClassVar[tuple[float, float]] = (1.0, 10_000.0)
    log: ClassVar[bool] = True

    def __init__(self, low: float = 4, high: float = 60) -> None:
        super().__init__(low, high)

    def value(self, unit: float) -> int:
        return round(super().value(unit))
