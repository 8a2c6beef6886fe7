"""Run action: what the solver's sensitivity curves are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem


class Mix(ActionComponent):
    """Weighs the rise of the loss against the reconstruction error: ``loss^(1 - mix) * error^mix``.

    The first is a second-order expansion around the dense model, good while little is pruned; the second knows nothing
    of the loss, and does not explode. 0 is the loss alone.
    """

    scope: ClassVar[Scope] = "run"
    solved: ClassVar[bool] = True

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        return replace(partial, mix=unit)

    def anchors(self) -> tuple[float, ...]:
        return (0.0,)
