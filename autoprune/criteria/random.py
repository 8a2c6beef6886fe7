"""Random: the control every other criterion must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.criteria.base import Criterion, LayerStatistics


class Random(Criterion):
    """Uniform scores from `seed`; the same for the same shape and seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed))
