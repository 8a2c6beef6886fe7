"""A problem's curves on the grid of sparsities: what a layer takes and what it loses, looked up rather than worked out.

Rows are layers in the inventory's order, columns sparsities 0, 1/GRID .. 1 of which `max_sparsity` is the last used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import Inventory
from autoprune.plan import LayerPlan, Plan

GRID = 100  # sparsities are multiples of 1/GRID, so that equal plans meet in the cache

_NONE = 1e-6  # of a loss or an error: what a power is taken of must not be 0

Array = NDArray[np.float64]
SPARSITIES = np.arange(GRID) / GRID


def place(sparsity: float) -> int:
    """The column of a sparsity."""
    return round(sparsity * GRID)


class Decided(NamedTuple):
    """What the layers decided so far add up to: the first `layers` of the inventory."""

    layers: int = 0
    saved_ms: float = 0.0  # of what they take as torch runs them
    lost: float = 0.0  # rise of the loss, one by one


@dataclass(frozen=True, eq=False)
class Curves:
    """Of one inventory, on one machine."""

    inventory: Inventory
    table: LatencyTable
    sensitivity: Sensitivity
    _ms: dict[str, Array] = field(default_factory=dict)

    def are_of(self, inventory: Inventory, table: LatencyTable, sensitivity: Sensitivity) -> bool:
        """Whether they were made of these very objects."""
        return self.inventory is inventory and self.table is table and self.sensitivity is sensitivity

    @cached_property
    def loss(self) -> Array:
        """Rise of the loss by each layer alone, (layers, GRID)."""
        return self._on_grid(self.sensitivity.loss)

    @cached_property
    def error(self) -> Array:
        """Share of each layer's output lost, (layers, GRID)."""
        return self._on_grid(self.sensitivity.error)

    def mixed(self, mix: float) -> Array:
        """``loss^(1 - mix) * error^mix``, never falling, (layers, GRID): the loss alone at 0, the error alone at 1."""
        if mix == 0.0:
            return self.loss
        mixed = (self.loss + _NONE) ** (1.0 - mix) * (self.error + _NONE) ** mix
        return np.maximum.accumulate(mixed - mixed[:, :1], axis=1)

    def _on_grid(self, curves: Mapping[str, tuple[float, ...]]) -> Array:
        anchors = (0.0, *self.sensitivity.anchors)
        return np.array([np.interp(SPARSITIES, anchors, (0.0, *curves[name])) for name in self.inventory.names])

    def ms(self, pattern: str) -> Array:
        """What each layer takes under a pattern, milliseconds, (layers, GRID)."""
        if pattern not in self._ms:
            table = self.table
            self._ms[pattern] = (
                np.array([[table.layer_us(name, pattern, s) for s in SPARSITIES] for name in self.inventory.names])
                / 1e3
            )
        return self._ms[pattern]

    @cached_property
    def dense_ms(self) -> Array:
        """What each layer would take as torch runs it, milliseconds, (layers,)."""
        return np.array([self.table.dense_us(name) for name in self.inventory.names]) / 1e3

    @cached_property
    def fixed_ms(self) -> float:
        """Milliseconds of the layers that no plan changes."""
        names = set(self.inventory.names)
        return sum(self.table.whole_us(name) for name in self.table.layers if name not in names) / 1e3

    def plan_ms(self, plan: Plan) -> Array:
        """The curves of each layer's own pattern in a plan, (layers, GRID)."""
        patterns = [str(plan.layers[name].pattern) for name in self.inventory.names]
        if len(set(patterns)) == 1:
            return self.ms(patterns[0])
        return np.array([self.ms(pattern)[row] for row, pattern in enumerate(patterns)])

    def decide(self, before: Decided, layer: LayerPlan) -> Decided:
        """The next layer decided too."""
        row, column = before.layers, place(layer.sparsity)
        saved_ms = self.dense_ms[row] - self.ms(str(layer.pattern))[row, column]
        return Decided(row + 1, before.saved_ms + float(saved_ms), before.lost + float(self.loss[row, column]))
