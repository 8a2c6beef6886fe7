"""Magnitude: |w| (Han et al. 2015). A group's saliency is the mean of its weights'."""

from __future__ import annotations

from torch import Tensor

from autoprune.criteria.base import Criterion, LayerStatistics


class Magnitude(Criterion):
    """Absolute value of each weight."""

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return weight.detach().abs()
