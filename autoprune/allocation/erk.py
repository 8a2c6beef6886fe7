"""Erdos-Renyi-Kernel: small layers are left denser (Evci et al. 2020, RigL, after Mocanu et al. 2018)."""

from __future__ import annotations

import math

from autoprune.allocation.base import Allocation, Layers

MOST = 0.999


class Erk(Allocation):
    """A layer's density is proportional to ``sum(shape) / prod(shape)`` of its weight, at most 1."""

    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        layers.check_free("allocation 'erk'")
        shapes = {name: layers.inventory[name].weight_shape for name in layers.planned(fraction)}
        share = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
        scale = 1.0 / min(share.values(), default=1.0)  # at which the last layer turns dense

        def curve(at: float) -> dict[str, float]:
            return {name: MOST * (1.0 - min(1.0, value * scale * (1.0 - at))) for name, value in share.items()}

        return layers.meet(curve, fraction)
