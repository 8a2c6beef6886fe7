"""Diagonal Fisher: the second-order change of the loss when a weight is cut (LeCun et al. 1990; Theis et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autoprune.criteria.base import Criterion, LayerStatistics


class Fisher(Criterion):
    """Half of w^2 times the mean squared gradient of the calibration samples, which stands for the Hessian."""

    needs: ClassVar[frozenset[str]] = frozenset({"squared_gradient"})

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        assert statistics.squared_gradient is not None
        return weight.detach().square() * statistics.squared_gradient / 2
