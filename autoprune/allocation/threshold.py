"""One threshold for all layers: cells compete across the whole model, and the layers' shares emerge."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from autoprune.allocation.base import Allocation, Layers
from autoprune.checks import check_flags, check_numbers
from autoprune.patterns.base import cell_means


class Threshold(Allocation):
    """Cuts the cells that score lowest, wherever they are, until the budget is met.

    Args:
        most: the highest sparsity of a layer, in (0, 1), so that none is cut through.
    """

    def __init__(self, most: float = 0.995) -> None:
        check_numbers("allocation", {"most": most}, 0.0, 1.0, "()")
        self.most = most

    @abstractmethod
    def compared(self, score: Tensor, size: Tensor) -> Tensor:
        """Scores that compare between layers, in an order that cuts the least salient first.

        Args:
            score: mean saliency of each cell of one layer, rising, ``(cells,)``.
            size: weights of each, ``(cells,)``.
        """

    @final
    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        layers.check_free("a global ranking")
        if fraction == 0.0:
            return layers.planned(0.0)
        rising: dict[str, Tensor] = {}  # layer -> comparable score of each cell
        zeros: dict[str, Tensor] = {}  # layer -> sparsity once that cell and those before it are cut
        for name in layers.planned(fraction):
            score, size = cell_means(layers.saliency[name], layers.cells[name])
            order = score.argsort(stable=True)
            score, size = score[order], size[order]
            comparable = self.compared(score.clamp(min=0.0), size)
            comparable = torch.where(score < 0.0, -1.0, comparable)  # cut already: before all others
            rising[name] = comparable.cummax(0).values
            share = size.double().cumsum(0) / size.sum()
            share[-1] = share[-2] if len(share) > 1 else 0.0  # one cell stays
            zeros[name] = torch.cat([torch.zeros(1, dtype=torch.float64), share])
        pool = torch.cat(list(rising.values())).sort().values if rising else torch.zeros(1, dtype=torch.float64)

        def curve(at: float) -> dict[str, float]:
            cut = pool[round(at * (len(pool) - 1))]
            below = {name: int(torch.searchsorted(score, cut, right=True)) for name, score in rising.items()}
            return {name: min(self.most, float(zeros[name][count])) for name, count in below.items()}

        return layers.meet(curve, fraction)


class Global(Threshold):
    """Mean saliency of a cell as it is, or over its layer's.

    Args:
        normalise: compare saliency over the root mean square of the layer's, so that the scale of a layer's weights,
            which a norm after it makes arbitrary, has no say.
        most: the highest sparsity of a layer, in (0, 1).
    """

    def __init__(self, normalise: bool = False, most: float = 0.995) -> None:
        super().__init__(most)
        check_flags("allocation 'global'", {"normalise": normalise})
        self.normalise = normalise

    def compared(self, score: Tensor, size: Tensor) -> Tensor:
        if not self.normalise:
            return score
        norm = ((score.square() * size).sum() / size.sum()).sqrt()
        return score / norm.clamp(min=1e-30)


class Lamp(Threshold):
    """A cell's energy over that of all cells of its layer that would outlive it (Lee et al. 2021, LAMP)."""

    def compared(self, score: Tensor, size: Tensor) -> Tensor:
        energy = score.square() * size
        outliving = energy.flip(0).cumsum(0).flip(0)
        return energy / outliving.clamp(min=1e-30)
