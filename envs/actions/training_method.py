"""Run action: the sparse-training method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, centres, pick
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.registry import Choice
from autoprune.training import TRAINING


class TrainingMethod(ActionComponent):
    """Picks one of `names` for the plan's training.

    Args:
        names: methods, each a name, or a table with a ``name`` and the method's arguments.
    """

    scope: ClassVar[Scope] = "run"
    needs_training: ClassVar[bool] = True

    def __init__(self, names: Sequence[str | Mapping[str, Any]] = ("one_shot", "gradual", "adaptive")) -> None:
        if not names:
            raise ConfigError("action 'training_method': names must list at least one method.")
        self.methods = tuple(_method(given) for given in names)

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        return replace(partial, training=pick(self.methods, unit))

    def anchors(self) -> tuple[float, ...]:
        return centres(len(self.methods))


def _method(given: str | Mapping[str, Any]) -> Choice:
    choice = Choice.of(given)
    TRAINING.create(choice)  # raises on a name or an argument that is none
    return choice
