"""Limits that add up over layers: zeros, multiply-adds, bytes of the file. Time is the latency table's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autoprune.envs.curves import SPARSITIES, Array
from autoprune.model.inventory import Inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.target import Target

_ROUNDING = 1e-9  # of a limit, that a sum of many layers may be out by


@dataclass(frozen=True)
class FileSize:
    """What the file of a repacked model takes, as far as it is known before it is written.

    Attributes:
        fixed_bytes: of all that no plan changes.
        bytes_per_weight: of a weight that is kept, above 0.
    """

    fixed_bytes: float = 0.0
    bytes_per_weight: float = 4.0


@dataclass(frozen=True)
class Limit:
    """A cost that falls linearly with a layer's sparsity, and the most that it may come to.

    Attributes:
        name: of the target's figure.
        of_layers: layer -> what it costs with all its weights.
        fixed: what everything else costs.
        at_most: the limit, in the same unit.
        in_bytes: what a layer that is planned in int8 costs, as a share of one in float32.
    """

    name: str
    of_layers: Mapping[str, float]
    fixed: float
    at_most: float
    in_bytes: float = 1.0

    def cost(self, plan: Plan) -> float:
        """What a plan costs; layers that it does not name keep all their weights."""
        layers = plan.layers
        kept = (self._share(layers[name]) * each if name in layers else each for name, each in self.of_layers.items())
        return self.fixed + math.fsum(kept)

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan is within the limit."""
        return self.cost(plan) <= self.at_most * (1.0 + _ROUNDING)

    def _share(self, layer: LayerPlan) -> float:
        return (1.0 - layer.sparsity) * (1.0 if layer.precision == "float32" else self.in_bytes)

    def curves(self, plan: Plan, names: list[str]) -> Array:
        """What each of these layers costs in its precision at each sparsity of the grid, (layers, GRID)."""
        whole = [self._share(replace(plan.layers[name], sparsity=0.0)) * self.of_layers[name] for name in names]
        return np.array(whole)[:, None] * (1.0 - SPARSITIES)

    def budget(self, names: list[str]) -> float:
        """What is left for these layers."""
        others = self.of_layers.keys() - set(names)
        return self.at_most - self.fixed - math.fsum(self.of_layers[name] for name in others)


def limits_of(target: Target, inventory: Inventory, file: FileSize) -> tuple[Limit, ...]:
    """The target's limits for these layers, but for those on time."""
    weights = {layer.name: float(layer.weights) for layer in inventory.layers}
    limits = []
    if target.sparsity is not None:
        limits.append(Limit("sparsity", weights, 0.0, (1.0 - target.sparsity) * math.fsum(weights.values())))
    if target.macs is not None:
        macs = {layer.name: float(layer.macs) for layer in inventory.layers}
        limits.append(Limit("macs", macs, 0.0, float(target.macs)))
    if target.size_bytes is not None:
        sizes = {name: each * file.bytes_per_weight for name, each in weights.items()}
        in_bytes = 1.0 / file.bytes_per_weight
        limits.append(Limit("size_bytes", sizes, file.fixed_bytes, float(target.size_bytes), in_bytes))
    return tuple(limits)
