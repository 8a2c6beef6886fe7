"""Run action: how strongly the chosen training method does what it does."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, between
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.registry import Choice
from autoprune.training import TRAINING

LOG_FACTOR = 10.0  # ranges at least this wide are walked on a log scale


class MethodStrength(ActionComponent):
    """Sets the argument that the plan's training method names as its strength; one without keeps its defaults."""

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("training_method",)

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        strength = TRAINING.get(partial.training.name).strength_range
        if strength is None:
            return partial
        name, low, high = strength
        value = between(low, high, unit, log=low > 0.0 and high >= LOG_FACTOR * low)
        args = {**partial.training.args, name: value}
        return replace(partial, training=Choice(partial.training.name, args))

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
