"""Gradient x weight: the first-order change of the loss when a weight is cut (Molchanov et al. 2017)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autoprune.criteria.base import Criterion, LayerStatistics


class Gradient(Criterion):
    """|w| times the summed |dL/dw| of the calibration batches."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        assert statistics.gradient is not None
        return weight.detach().abs() * statistics.gradient
