"""Run action: how long the pruned model trains."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError


class Epochs(ActionComponent):
    """Sets ``epochs`` to a whole number from `low` to `high`."""

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True

    def __init__(self, low: int = 1, high: int = 10) -> None:
        if not all(type(count) is int for count in (low, high)) or not 1 <= low < high:
            raise ConfigError(f"action 'epochs' needs whole numbers 1 <= low < high, not low={low!r}, high={high!r}.")
        self.low, self.high = low, high

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        epochs = self.low + round((unit + 1.0) / 2.0 * (self.high - self.low))
        return replace(partial, settings={**partial.settings, "epochs": epochs})

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
