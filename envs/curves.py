"""A problem's curves on the grid of sparsities: what a layer takes and what it loses, looked up rather than worked out.

Rows are layers in the inventory's order, columns sparsities 0, 1/GRID .. 1 of which `max_sparsity` is the last used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import Inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.precision import OfLayer

GRID = 100  # sparsities are multiples of 1/GRID, so that equal plans meet in the cache

_NONE = 1e-6  # of a loss or an error: what a power is taken of must not be 0

Array = NDArray[np.float64]
Key = TypeVar("Key", bound=str)
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
    _lost: dict[tuple[str, OfLayer], Array] = field(default_factory=dict)

    def are_of(self, inventory: Inventory, table: LatencyTable, sensitivity: Sensitivity) -> bool:
        """Whether they were made of these very objects."""
        return self.inventory is inventory and self.table is table and self.sensitivity is sensitivity

    @property
    def loss(self) -> Array:
        """Rise of the loss by each layer alone, in float32, (layers, GRID)."""
        return self.losses("float32")

    @property
    def error(self) -> Array:
        """Share of each layer's output lost, in float32, (layers, GRID)."""
        return self.errors("float32")

    def losses(self, precision: OfLayer) -> Array:
        """Rise of the loss by each layer alone, (layers, GRID)."""
        return self._on_grid("loss", precision)

    def errors(self, precision: OfLayer) -> Array:
        """Share of each layer's output lost, (layers, GRID)."""
        return self._on_grid("error", precision)

    def mixed(self, mix: float, precision: OfLayer = "float32") -> Array:
        """``loss^(1 - mix) * error^mix``, never falling, (layers, GRID): the loss alone at 0, the error alone at 1."""
        if mix == 0.0:
            return self.losses(precision)
        nothing = self._product(mix, "float32")[:, :1]  # of a whole layer in float32
        return np.maximum.accumulate(self._product(mix, precision) - nothing, axis=1)

    def _product(self, mix: float, precision: OfLayer) -> Array:
        loss, error = self.losses(precision), self.errors(precision)
        return np.asarray((loss + _NONE) ** (1.0 - mix) * (error + _NONE) ** mix)

    def _on_grid(self, kind: Literal["loss", "error"], precision: OfLayer) -> Array:
        if (kind, precision) not in self._lost:
            found = self.sensitivity.of(precision)
            curves = getattr(found, kind)
            rows = [np.interp(SPARSITIES, found.anchors, curves[name]) for name in self.inventory.names]
            self._lost[kind, precision] = np.array(rows)
        return self._lost[kind, precision]

    def ms(self, curve: str) -> Array:
        """What each layer takes on one of the latency table's curves, milliseconds, (layers, GRID)."""
        if curve not in self._ms:
            table = self.table
            self._ms[curve] = (
                np.array([[table.layer_us(name, curve, s) for s in SPARSITIES] for name in self.inventory.names]) / 1e3
            )
        return self._ms[curve]

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
        """What each layer takes with its own pattern and precision in a plan, (layers, GRID)."""
        return _by_row([plan.layers[name].curve for name in self.inventory.names], self.ms)

    def plan_mixed(self, plan: Plan, mix: float) -> Array:
        """`mixed`, of each layer's own precision in a plan, (layers, GRID)."""
        return _by_row([plan.layers[name].precision for name in self.inventory.names], partial(self.mixed, mix))

    def plan_lost(self, plan: Plan) -> tuple[Array, Array]:
        """Rise of the loss by each layer of a plan alone, and the share of its output that is lost, (layers,) each."""
        layers = [plan.layers[name] for name in self.inventory.names]
        precisions, columns = [layer.precision for layer in layers], [place(layer.sparsity) for layer in layers]
        rows = np.arange(len(layers))
        return _by_row(precisions, self.losses)[rows, columns], _by_row(precisions, self.errors)[rows, columns]

    def decide(self, before: Decided, layer: LayerPlan) -> Decided:
        """The next layer decided too."""
        row, column = before.layers, place(layer.sparsity)
        saved_ms = self.dense_ms[row] - self.ms(layer.curve)[row, column]
        lost = self.losses(layer.precision)[row, column]
        return Decided(row + 1, before.saved_ms + float(saved_ms), before.lost + float(lost))


def _by_row(keys: Sequence[Key], curves: Callable[[Key], Array]) -> Array:
    """The row of each layer in the curves of its key, (layers, GRID)."""
    if len(set(keys)) == 1:
        return curves(keys[0])
    return np.array([curves(key)[row] for row, key in enumerate(keys)])
