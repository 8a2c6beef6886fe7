"""Optimal brain surgeon, layer by layer (Hassibi and Stork 1993; Dong et al. 2017; Frantar and Alistarh 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.checks import check_counts, check_numbers
from autoprune.criteria.base import Criterion, LayerStatistics
from autoprune.criteria.least_squares import LeastSquares, damped, factored


class Obs(Criterion):
    """How much the layer's mean squared output error grows when the weight is cut and its row makes the best of it.

    This is ``w^2 / [H^-1]_jj``, with H the second moments of the layer's input. For cells that hold one weight of a
    row, such as groups of filters, a cell's sum is exact too. The recovery 'reconstruct' makes the best of it.
    Takes time cubic in the weights of a filter.

    In several steps (after Kurtic et al. 2022), each cuts as large a share of what is left. Between them the kept
    weights are refitted and H is inverted anew, over what is kept, so that what one cut makes another one cost is seen;
    a cell of several weights of a row is scored as a whole. Takes as long for each step and each group of filters.

    Args:
        damping: added to H's diagonal, over the diagonal's mean; > 0.
        steps: 1 to 256.
    """

    needs = frozenset({"input_moments"})

    def __init__(self, damping: float = 0.01, steps: int = 1) -> None:
        check_numbers("criterion 'obs'", {"damping": damping}, 0.0, ends="(]")
        check_counts("criterion 'obs'", {"steps": steps}, most=256)
        self.damping, self.steps = damping, steps

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        assert statistics.input_moments is not None
        moments = damped(statistics.input_moments, self.damping)
        inverse = torch.cholesky_inverse(factored(moments, self.damping)).diagonal(dim1=1, dim2=2)  # (conv_groups, c)
        rows = weight.detach().double().reshape(conv_groups, -1, inverse.shape[1])
        return (rows.square() / inverse[:, None]).reshape(weight.shape).to(weight.dtype)

    def saliency_left(
        self, weight: Tensor, statistics: LayerStatistics, kept: Tensor, cells: Tensor, conv_groups: int = 1
    ) -> Tensor:
        assert statistics.input_moments is not None
        moments, cross = statistics.input_moments.double(), statistics.cross_moments
        rows = weight.detach().double().reshape(conv_groups, -1, moments.shape[-1])
        fit = LeastSquares(rows, moments, rows @ moments if cross is None else cross.double(), self.damping)
        return fit.errors(kept.reshape(rows.shape), cells.reshape(rows.shape)).reshape(weight.shape)
