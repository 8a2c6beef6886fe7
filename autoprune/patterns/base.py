"""What a pattern is: a rule that turns saliencies and a sparsity into a mask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from autoprune.errors import AutopruneError


class Pattern(ABC):
    """A set of allowed masks. Shapes are a weight's: ``(out, in / conv_groups, kh, kw)`` or ``(out, in)``.

    Attributes:
        any_sparsity: whether a layer may have any sparsity, as far as its cells divide it.
        whole_filters: whether a cell is a filter; of a recurrent layer, a unit with all its gates.
    """

    any_sparsity: ClassVar[bool] = True
    whole_filters: ClassVar[bool] = False

    @property
    def nested(self) -> bool:
        """Whether a mask keeps all that a sparser one keeps, so that masks of any sparsity come from one ranking."""
        return True

    def on_the_way(self, sparsity: float) -> Pattern:
        """The pattern by which a layer is cut to a lower sparsity, where it is cut in steps; masks of this lie in its.

        Args:
            sparsity: of the step, below that of this pattern where it allows one alone.
        """
        return self

    @abstractmethod
    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        """Returns, in the weight's shape, the number of the cell each weight belongs to (int64, from 0).

        A cell is the set of weights that live or die together.
        """

    def arrange(self, saliency: Tensor, sparsity: float, conv_groups: int = 1) -> Tensor:
        """Returns the cells to rank: those of `cells`, unless the pattern chooses which weights share one.

        Args:
            saliency: scores >= 0, in the weight's shape; negative where a weight is cut already.
            sparsity: that the layer is on its way to, in [0, 1).
            conv_groups: groups of a grouped convolution.
        """
        return self.cells(tuple(saliency.shape), conv_groups)

    @final
    def mask(
        self,
        saliency: Tensor,
        sparsity: float,
        conv_groups: int = 1,
        within: Tensor | None = None,
        final_sparsity: float | None = None,
    ) -> Tensor:
        """Keeps the most salient cells; True keeps.

        Args:
            saliency: scores >= 0, in the weight's shape.
            sparsity: fraction of zeros asked for, in [0, 1). At least one cell is always kept.
            conv_groups: groups of a grouped convolution; cells never straddle them.
            within: an earlier mask of this pattern; what it cuts stays cut.
            final_sparsity: that later masks within this one will reach; `sparsity` when left out.
        """
        if not 0.0 <= sparsity < 1.0:
            raise AutopruneError(f"a sparsity must be in [0, 1), not {sparsity}.")
        scores = _checked(saliency)
        if within is not None:
            scores = scores.masked_fill(~within, -1.0)  # below every score: ties cannot bring it back
        cells = self.arrange(scores, sparsity if final_sparsity is None else final_sparsity, conv_groups)
        mask = self.select(scores, sparsity, cells)
        return mask if within is None else mask & within

    @final
    def masks(self, saliency: Tensor, sparsities: Sequence[float], conv_groups: int = 1) -> list[Tensor]:
        """`mask` at each sparsity, the layer ranked once where masks are nested."""
        if not self.nested:
            return [self.mask(saliency, sparsity, conv_groups) for sparsity in sparsities]
        cells = self.cells(tuple(saliency.shape), conv_groups)
        order, size = _ranked(_checked(saliency), cells)
        return [_alive(order, size, sparsity)[cells] for sparsity in sparsities]

    def select(self, saliency: Tensor, sparsity: float, cells: Tensor) -> Tensor:
        """Ranks all the layer's cells by mean saliency against one another."""
        return _alive(*_ranked(saliency, cells), sparsity)[cells]

    def feasible(self, shape: tuple[int, ...], sparsity: float, conv_groups: int = 1) -> float:
        """Returns the sparsity `mask` will have when asked for `sparsity`, exact for equal-sized cells."""
        cells = self.cells(shape, conv_groups).flatten()
        size = torch.bincount(cells).double().mean().item()
        kept = max(1, int(round((1.0 - sparsity) * cells.numel()) / size + 1e-9))
        return max(0.0, 1.0 - kept * size / cells.numel())

    def check(self, mask: Tensor, conv_groups: int = 1) -> bool:
        """Whether every cell of `mask` is wholly kept or wholly cut."""
        cells = self.cells(tuple(mask.shape), conv_groups).flatten()
        flat = mask.flatten().long()
        size = torch.bincount(cells)
        kept = torch.zeros_like(size).index_add_(0, cells, flat)
        return bool(((kept == 0) | (kept == size)).all())


def _checked(saliency: Tensor) -> Tensor:
    """As float64, in which no sum of finite floats overflows."""
    scores = saliency.detach()
    if not math.isfinite(float(scores.sum(dtype=torch.float64))):
        raise AutopruneError("the saliency holds NaN or infinity; the model or its gradients have diverged.")
    return scores.double()


def _ranked(saliency: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The cells, the most salient first, and the weights each cell holds; both ``(cells,)``."""
    score, size = cell_means(saliency, cells)
    return torch.argsort(score, descending=True, stable=True), size


def _alive(order: Tensor, size: Tensor, sparsity: float) -> Tensor:
    """The first cells of `order` that hold the weights to keep, at least one: bool, ``(cells,)``."""
    kept = torch.cumsum(size[order], 0) <= round((1.0 - sparsity) * int(size.sum()))
    kept[0] = True
    alive = torch.zeros(len(size), dtype=torch.bool)
    alive[order[kept]] = True
    return alive


def cell_means(values: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of `values` over each cell, float64, and the weights each holds; both ``(cells,)``."""
    flat = cells.flatten()
    size = torch.bincount(flat)
    total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, flat, values.detach().flatten().double())
    return total / size, size


def cell_sizes(values: Tensor, cells: Tensor) -> Tensor:
    """The root mean square of `values` over each cell, float64, ``(cells,)``: its norm, but for the cell's size."""
    mean, _ = cell_means(values.detach().square(), cells)
    return mean.sqrt()


def columns(shape: tuple[int, ...]) -> int:
    """Weights of one filter: ``in / conv_groups * kh * kw``."""
    product = 1
    for extent in shape[1:]:
        product *= extent
    return product
