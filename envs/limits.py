"""Limits that add up over layers: zeros, multiply-adds, bytes of the file. Time is the latency table's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autoprune.envs.curves import SPARSITIES, Array
from autoprune.model.inventory import Inventory
from autoprune.plan import Plan
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
    """

    name: str
    of_layers: Mapping[str, float]
    fixed: float
    at_most: float

    def cost(self, plan: Plan) -> float:
        """What a plan costs; layers that it does not name keep all their weights."""
        layers = plan.layers
        kept = (
            (1.0 - layers[name].sparsity if name in layers else 1.0) * each for name, each in self.of_layers.items()
        )
        return self.fixed + math.fsum(kept)

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan is within the limit."""
        return self.cost(plan) <= self.at_most * (1.0 + _ROUNDING)

    def curves(self, names: list[str]) -> Array:
        """What each of these layers costs at each sparsity of the grid, (layers, GRID)."""
        return np.array([self.of_layers[name] for name in names])[:, None] * (1.0 - SPARSITIES)

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
        limits.append(Limit("size_bytes", sizes, file.fixed_bytes, float(target.size_bytes)))
    return tuple(limits)
