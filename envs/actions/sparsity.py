"""Layer action: how sparse, as an offset from the plan that treats every layer alike."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope
from autoprune.envs.problem import Problem
from autoprune.envs.projection import GRID, logit, sigmoid
from autoprune.errors import ConfigError
from autoprune.plan import Plan


class Sparsity(ActionComponent):
    """Moves the layer's sparsity by up to `reach` logits from where the episode started.

    The zero action keeps the uniform plan, so that learning starts from a known rule rather than from noise.
    """

    scope: ClassVar[Scope] = "layer"

    def __init__(self, reach: float = 2.5) -> None:
        if not 0.0 < reach <= 10.0:
            raise ConfigError(f"action 'sparsity': reach must be in (0, 10] logits, not {reach}.")
        self.reach = reach

    def decode(self, unit: float, problem: Problem, plan: Plan, layer: str | None) -> Plan:
        assert layer is not None
        start = plan.layers[layer]
        moved = sigmoid(logit(start.sparsity) + self.reach * unit)
        return plan.with_layer(layer, replace(start, sparsity=min(problem.max_sparsity, round(moved * GRID) / GRID)))

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
