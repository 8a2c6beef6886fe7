"""Run action: the learning rate of recovery and fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, between
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError


class LearningRate(ActionComponent):
    """Sets ``learning_rate`` on a log scale between `low` and `high`."""

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True

    def __init__(self, low: float = 1e-3, high: float = 1e-1) -> None:
        if not 0.0 < low < high:
            raise ConfigError(f"action 'learning_rate': needs 0 < low < high, not low={low}, high={high}.")
        self.low, self.high = low, high

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        rate = between(self.low, self.high, unit, log=True)
        return replace(partial, settings={**partial.settings, "learning_rate": rate})

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
