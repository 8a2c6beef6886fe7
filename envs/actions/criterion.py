"""Run action: the criterion that scores the weights of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from autoprune.criteria import CRITERIA
from autoprune.envs.actions.base import ActionComponent, Scope, centres, pick
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.registry import Choice


class CriterionChoice(ActionComponent):
    """Picks one of `names` for the whole plan."""

    scope: ClassVar[Scope] = "run"

    def __init__(self, names: Sequence[str] = ("magnitude", "gradient", "activation")) -> None:
        if not names:
            raise ConfigError("action 'criterion': names must list at least one criterion.")
        for name in names:
            CRITERIA.get(name)
        self.names = tuple(names)

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        chosen = Choice(pick(self.names, unit))
        return replace(partial, layers={name: replace(each, criterion=chosen) for name, each in partial.layers.items()})

    def anchors(self) -> tuple[float, ...]:
        return centres(len(self.names))
