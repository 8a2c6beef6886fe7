"""What an episode is about: a model's layers, their measured curves, a target, and how a plan is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autoprune.evaluation.measurement import Evaluate
from autoprune.inventory import Inventory
from autoprune.latency.table import LatencyTable
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.target import Target


@dataclass(frozen=True)
class Sensitivity:
    """Drop of the score when one layer alone is pruned to an anchor sparsity; one curve a layer, >= 0."""

    anchors: tuple[float, ...]
    drops: Mapping[str, tuple[float, ...]]

    def drop(self, name: str, sparsity: float) -> float:
        """Linear between anchors, from no loss at sparsity 0."""
        return float(np.interp(sparsity, (0.0, *self.anchors), (0.0, *self.drops[name])))


@dataclass(frozen=True)
class Problem:
    """One task: model, data and target, reduced to what an agent needs.

    Attributes:
        dense_score: the dense model's, on the validation split.
        evaluate: plan -> Measurement; the expensive part of an episode.
        pattern: the pattern of layers whose pattern no action sets; likewise `criterion`.
        training: the sparse-training method of plans whose method no action sets.
        max_sparsity: the highest sparsity of any layer.
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

    def uniform(self, sparsity: float) -> Plan:
        """The plan that treats every layer alike."""
        layer = LayerPlan(sparsity, self.pattern, self.criterion)
        return Plan(dict.fromkeys(self.inventory.names, layer), self.training)
