"""Run actions that set an argument of the plan's training method; a method that has no such argument keeps its own."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, between, centres, pick
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.registry import Choice
from autoprune.training import TRAINING


class MethodArgument(ActionComponent):
    """Sets the first of `arguments` that the method has.

    Attributes:
        arguments: names that methods have for the same thing.
    """

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("training_method",)
    arguments: ClassVar[tuple[str, ...]]

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        has = inspect.signature(TRAINING.get(partial.training.name)).parameters
        name = next((name for name in self.arguments if name in has), None)
        if name is None:
            return partial
        args = {**partial.training.args, name: self.value(unit)}
        return replace(partial, training=Choice(partial.training.name, args))

    @abstractmethod
    def value(self, unit: float) -> Any:
        """The argument's value for a unit in [-1, 1]."""


class MethodNumber(MethodArgument):
    """Walks an argument from `low` to `high`; on a log scale where `log`."""

    log: ClassVar[bool] = False
    limits: ClassVar[tuple[float, float]]  # allowed for low and high

    def __init__(self, low: float, high: float) -> None:
        least, most = self.limits
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (low, high))
        if not numbers or not least <= low < high <= most:
            raise ConfigError(
                f"an action for {self.arguments[0]!r} needs {least:g} <= low < high <= {most:g}, not low={low!r}, "
                f"high={high!r}."
            )
        self.low, self.high = low, high

    def value(self, unit: float) -> float:
        return between(self.low, self.high, unit, self.log)

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)


class MethodOption(MethodArgument):
    """Picks an argument's value from a list."""

    def __init__(self, options: Sequence[Any]) -> None:
        if not options:
            raise ConfigError(f"an action for {self.arguments[0]!r}: options must list at least one value.")
        self.options = tuple(options)

    def value(self, unit: float) -> Any:
        return pick(self.options, unit)

    def anchors(self) -> tuple[float, ...]:
        return centres(len(self.options))
