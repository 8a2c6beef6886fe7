"""Allocation: how a budget is shared among the layers without a search. One file and one row an allocation."""

from collections.abc import Mapping
from typing import Any

from autoprune.allocation.base import Allocation, Layers, layer_cells
from autoprune.allocation.cost import Cost, MacsCost, WeightCost
from autoprune.registry import Choice, Registry

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


def make_allocation(given: str | Mapping[str, Any]) -> Allocation:
    """The allocation that a method's argument names.

    Args:
        given: a name, or a table with a ``name`` and its arguments, e.g. ``{"name": "global", "normalise": true}``.

    Raises:
        ConfigError: no such allocation, or no such argument.
    """
    return ALLOCATIONS.create(Choice.of(given))


__all__ = ["ALLOCATIONS", "Allocation", "Cost", "Layers", "MacsCost", "WeightCost", "layer_cells", "make_allocation"]
