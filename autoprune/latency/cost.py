"""A budget in milliseconds: what the latency table predicts for the repacked model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoprune.allocation import Cost
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import Inventory
from autoprune.plan import Plan


@dataclass(frozen=True)
class LatencyCost(Cost):
    """Predicted milliseconds of the whole model.

    Attributes:
        table: measured on the model as it was when it was profiled.
        plan: the layers' patterns and precisions.
        profiled: the layers of that model.
        inventory: the layers of the model that is pruned, perhaps wider: a layer with as many weights left as one of
            the profiled model is taken to be as fast.
    """

    table: LatencyTable
    plan: Plan
    profiled: Inventory
    inventory: Inventory

    def __call__(self, sparsities: Mapping[str, float]) -> float:
        total_us = 0.0
        for name in self.table.layers:
            share = sparsities.get(name, 0.0)
            if name in self.inventory.by_name:
                share = 1.0 - (1.0 - share) * self.inventory[name].weights / self.profiled[name].weights
            if name in self.plan.layers:
                total_us += self.table.layer_us(name, self.plan.layers[name].curve, max(0.0, share))
            else:
                total_us += self.table.whole_us(name)
        return self.table.whole_ms(total_us / 1e3)
