"""Layer action: how much the layer's sensitivity counts when the solver shares out the budget."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError


class Coefficient(ActionComponent):
    """Multiplies the layer's sensitivity curve by up to ``exp(reach)`` either way.

    The zero action is the solver's own plan (`envs.knapsack`), so that learning starts from the best known rule, and
    every plan meets the budget. SPDY searches these coefficients at random; here they are what a policy learns.
    """

    scope: ClassVar[Scope] = "layer"
    solved: ClassVar[bool] = True

    def __init__(self, reach: float = 2.0) -> None:
        if not 0.0 < reach <= 10.0:
            raise ConfigError(f"action 'coefficient': reach must be in (0, 10], not {reach}.")
        self.reach = reach

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        assert layer is not None
        return replace(partial, coefficients={**partial.coefficients, layer: math.exp(self.reach * unit)})

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
