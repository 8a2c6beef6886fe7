"""What an episode is about: a model's layers, their measured curves, a target, and how a plan is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoprune.envs.curves import Curves
from autoprune.evaluation.measurement import Evaluate
from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import Inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.target import Target


@dataclass(frozen=True)
class Problem:
    """One task: model, data and target, reduced to what an agent needs.

    Attributes:
        dense_score: the dense model's, on the validation split.
        evaluate: plan -> Measurement; the expensive part of an episode.
        pattern: the pattern of layers whose pattern no action sets; likewise `criterion`.
        training: the sparse-training method of plans whose method no action sets.
        max_sparsity: the highest sparsity of any layer.
        curves: what every layer takes and loses at every sparsity.
    """

    inventory: Inventory
    table: LatencyTable
    sensitivity: Sensitivity
    dense_score: float
    evaluate: Evaluate
    target: Target
    pattern: Choice
    criterion: Choice
    training: Choice
    max_sparsity: float = 0.95
    curves: Curves = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # made when left out

    def __post_init__(self) -> None:
        """Copies of a problem with another target or evaluation share its curves."""
        if self.curves is None or not self.curves.are_of(self.inventory, self.table, self.sensitivity):
            object.__setattr__(self, "curves", Curves(self.inventory, self.table, self.sensitivity))

    def uniform(self, sparsity: float) -> Plan:
        """The plan that treats every layer alike."""
        layer = LayerPlan(sparsity, self.pattern, self.criterion)
        return Plan(dict.fromkeys(self.inventory.names, layer), self.training)
