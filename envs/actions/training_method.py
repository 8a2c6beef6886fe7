"""Run action: the sparse-training method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, centres, pick
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.training import TRAINING


class TrainingMethod(ActionComponent):
    """Picks one of `names` for the plan's training."""

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True

    def __init__(self, names: Sequence[str] = ("one_shot", "gradual")) -> None:
        if not names:
            raise ConfigError("action 'training_method': names must list at least one method.")
        for name in names:
            TRAINING.get(name)
        self.names = tuple(names)

    def decode(self, unit: float, problem: Problem, plan: Plan, layer: str | None) -> Plan:
        return replace(plan, training=Choice(pick(self.names, unit)))

    def anchors(self) -> tuple[float, ...]:
        return centres(len(self.names))
