"""Uniform: one sparsity for every layer."""

from __future__ import annotations

from autoprune.allocation.base import Allocation, Layers

MOST = 0.999


class Uniform(Allocation):
    """The least common sparsity that meets the budget."""

    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        layers.check_free("allocation 'uniform'")
        names = list(layers.planned(fraction))
        return layers.meet(lambda sparsity: dict.fromkeys(names, sparsity * MOST), fraction)
