"""Allocation: how a budget is shared among the layers without a search. One file and one row an allocation."""

from autoprune.allocation.base import Allocation, Layers
from autoprune.allocation.cost import Cost, MacsCost, WeightCost
from autoprune.registry import Registry

ALLOCATIONS: Registry[Allocation] = Registry(
    "allocation",
    {
        "planned": "autoprune.allocation.planned:Planned",
        "uniform": "autoprune.allocation.uniform:Uniform",
        "erk": "autoprune.allocation.erk:Erk",
        "global": "autoprune.allocation.threshold:Global",
        "lamp": "autoprune.allocation.threshold:Lamp",
    },
)

__all__ = ["ALLOCATIONS", "Allocation", "Cost", "Layers", "MacsCost", "WeightCost"]
