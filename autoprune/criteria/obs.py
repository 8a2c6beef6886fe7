"""Optimal brain surgeon, layer by layer (Hassibi and Stork 1993; Dong et al. 2017; Frantar and Alistarh 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.criteria.base import Criterion, LayerStatistics
from autoprune.errors import ConfigError


class Obs(Criterion):
    """How much the layer's mean squared output error grows when the weight is cut and its row makes the best of it.

    This is ``w^2 / [H^-1]_jj``, with H the second moments of the layer's input. For cells that hold one weight of a
    row, such as groups of filters, a cell's sum is exact too. The recovery 'reconstruct' makes the best of it.
    Takes time cubic in the weights of a filter.

    Args:
        damping: added to H's diagonal, over the diagonal's mean; > 0.
    """

    needs = frozenset({"input_moments"})

    def __init__(self, damping: float = 0.01) -> None:
        if not isinstance(damping, (int, float)) or isinstance(damping, bool) or not 0.0 < damping < float("inf"):
            raise ConfigError(f"criterion 'obs': damping must be a number > 0, not {damping!r}.")
        self.damping = damping

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        assert statistics.input_moments is not None
        moments = damped(statistics.input_moments, self.damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments)).diagonal(dim1=1, dim2=2)  # (conv_groups, c)
        rows = weight.detach().double().reshape(conv_groups, -1, inverse.shape[1])
        return (rows.square() / inverse[:, None]).reshape(weight.shape).to(weight.dtype)


def damped(moments: Tensor, damping: float) -> Tensor:
    """Moments ``(..., c, c)`` as float64, `damping` times the mean of the diagonal added to it."""
    moments = moments.double()
    extent = moments.shape[-1]
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return moments + damping * mean[..., None, None] * torch.eye(extent, dtype=torch.float64)
