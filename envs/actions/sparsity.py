"""Layer action: how sparse, as an offset from the plan the episode starts with."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope
from autoprune.envs.curves import GRID
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.envs.projection import logit, sigmoid
from autoprune.errors import ConfigError


class Sparsity(ActionComponent):
    """Moves the layer's sparsity by up to `reach` logits from where the episode started.

    The zero action keeps that plan (`PruneEnv.start`), so that learning starts from a known rule, not from noise.
    """

    scope: ClassVar[Scope] = "layer"

    def __init__(self, reach: float = 2.5) -> None:
        if not 0.0 < reach <= 10.0:
            raise ConfigError(f"action 'sparsity': reach must be in (0, 10] logits, not {reach}.")
        self.reach = reach

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        assert layer is not None
        start = partial.layers[layer]
        moved = sigmoid(logit(start.sparsity) + self.reach * unit)
        return partial.with_layer(layer, replace(start, sparsity=min(problem.max_sparsity, round(moved * GRID) / GRID)))

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
