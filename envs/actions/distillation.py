"""Run action: how much of the loss comes from the dense teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem


class Distillation(ActionComponent):
    """Sets ``distillation_weight`` in [0, 1], in steps of 0.1."""

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        return replace(partial, settings={**partial.settings, "distillation_weight": round((unit + 1.0) * 5) / 10})

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
