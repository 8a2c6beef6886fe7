"""Layer action: how many filters share their kept positions (1 is unstructured)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, centres, pick
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.registry import Choice


class GroupSize(ActionComponent):
    """Picks the size of the `group` pattern."""

    scope: ClassVar[Scope] = "layer"

    def __init__(self, sizes: Sequence[int] = (4, 8, 16)) -> None:
        if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ConfigError(f"action 'group_size': sizes must be positive integers, not {list(sizes)!r}.")
        self.sizes = tuple(sizes)

    @property
    def patterns(self) -> tuple[Choice, ...]:
        """Every pattern this action can set: the latency table must have their curves."""
        return tuple(Choice("group", {"size": size}) for size in self.sizes)

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        assert layer is not None
        return partial.with_layer(layer, replace(partial.layers[layer], pattern=pick(self.patterns, unit)))

    def anchors(self) -> tuple[float, ...]:
        return centres(len(self.sizes))
