"""Planned: the plan's own sparsities, layer by layer."""

from __future__ import annotations

from typing import ClassVar

from autoprune.allocation.base import Allocation, Layers


class Planned(Allocation):
    """Each layer at its share of what the plan says."""

    finds_shares: ClassVar[bool] = False

    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        return layers.planned(fraction)
