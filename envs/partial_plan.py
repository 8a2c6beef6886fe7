"""A plan in the making: what the actions so far have decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoprune.plan import Plan
from autoprune.precision import OfLayer


@dataclass(frozen=True)
class PartialPlan(Plan):
    """A plan, and what the solver is to weigh each layer's sensitivity by when it makes the plan that is measured.

    Attributes:
        coefficients: layer -> factor on its sensitivity curve, above 0; 1 for a layer that has none.
        precisions: of the layers whose precision an action has chosen: the solver keeps it.
        mix: what a sensitivity curve is made of: ``loss^(1 - mix) * error^mix``, in [-1, 1].
    """

    coefficients: Mapping[str, float] = field(default_factory=dict)
    precisions: Mapping[str, OfLayer] = field(default_factory=dict)
    mix: float = 0.0

    @classmethod
    def of(cls, plan: Plan) -> PartialPlan:
        return cls(plan.layers, plan.training, plan.settings)

    @property
    def plan(self) -> Plan:
        return Plan(self.layers, self.training, self.settings)
