"""Proximal: an L1/2 (or L1, or no) penalty by its proximal operator, as strong as the budget asks.

Half thresholding (Xu et al. 2012) has a closed form, cuts like the best subset and shrinks what is large less than L1
does. Its strength follows from the budget: the threshold is the size of the largest cell that must go. With `splice`,
what is cut keeps its value behind the mask and can return (Guo et al. 2016, dynamic network surgery).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.checks import check_counts, check_flags, check_numbers
from autoprune.errors import ConfigError, did_you_mean
from autoprune.patterns.base import cell_means, cell_sizes
from autoprune.training.base import Signals
from autoprune.training.latent import LatentTraining
from autoprune.training.schedule import CUBIC, check_span, cuts


def half(size: Tensor, threshold: float) -> Tensor:
    """Half thresholding: argmin over x of ``(x - size)^2 + strength * sqrt(|x|)``, for sizes above the threshold.

    The strength is the one whose threshold is given, ``54^(1/3) / 4 * strength^(2/3)`` (Xu et al. 2012, theorem 1). At
    the threshold the result is two thirds of it.
    """
    strength = (4.0 * threshold / 54.0 ** (1 / 3)) ** 1.5
    angle = torch.acos((strength / 8.0 * (size / 3.0).clamp(min=1e-30) ** -1.5).clamp(max=1.0))
    return 2.0 / 3.0 * size * (1.0 + torch.cos(2.0 / 3.0 * (math.pi - angle)))


def soft(size: Tensor, threshold: float) -> Tensor:
    """Soft thresholding, the operator of L1: sizes above the threshold lose it."""
    return size - threshold


def hard(size: Tensor, threshold: float) -> Tensor:
    """Hard thresholding, the operator of L0: sizes above the threshold stay."""
    return size


PENALTIES: Mapping[str, Callable[[Tensor, float], Tensor]] = {"half": half, "l1": soft, "none": hard}


class Proximal(LatentTraining):
    """Thresholds the cells' sizes at each of `updates` steps, at a sparsity that rises along a cubic; then trains on.

    The size of a cell is the root mean square of its weights: the weight itself without a structure, the group's norm
    with one.

    Args:
        penalty: ``half``, ``l1`` or ``none`` (cut, shrink nothing).
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the budget is met, in (begin, 1]; the masks stay as they are after it.
        updates: thresholdings between the two, >= 1.
        exponent: of the rise, in [0.1, 10]; 1 is even, 3 cubic, more cuts earlier.
        relaxation: how far a thresholding goes for what it keeps, in [0, 1]; 0 shrinks nothing.
        splice: whether what is cut keeps its value, goes on learning and may return until `end`.
        allocation: what shares the plan's budget among the layers: a name, or a table with its arguments.
    """

    strength_range = ("relaxation", 0.0, 1.0)

    def __init__(
        self,
        penalty: str = "half",
        begin: float = 0.0,
        end: float = 0.6,
        updates: int = 30,
        exponent: float = CUBIC,
        relaxation: float = 0.3,
        splice: bool = False,
        allocation: str | Mapping[str, Any] = "planned",
    ) -> None:
        if penalty not in PENALTIES:
            raise ConfigError(
                f"training method 'proximal': unknown penalty {penalty!r}. {did_you_mean(str(penalty), PENALTIES)}"
            )
        check_span("proximal", begin, end)
        check_counts("training method 'proximal'", {"updates": updates})
        check_numbers("training method 'proximal'", {"exponent": exponent}, 0.1, 10.0)
        check_numbers("training method 'proximal'", {"relaxation": relaxation}, 0.0, 1.0)
        check_flags("training method 'proximal'", {"splice": splice})
        self.operator, self.begin, self.end, self.updates = PENALTIES[penalty], begin, end, updates
        self.exponent = exponent
        self.relaxation, self.splice = relaxation, splice
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def prepare(self) -> None:
        self._fractions = cuts(self.begin, self.end, self.updates, self.total_steps, self.exponent)
        self._cells = {name: self.pruner.cells(name) for name in self.latent}
        self.threshold = dict.fromkeys(self.latent, 0.0)

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        if name not in self.masks or self.splice:
            return gradient
        return gradient * self.masks[name]

    def update(self, step: int) -> None:
        if step not in self._fractions:
            return
        sizes = {name: cell_sizes(latent, self._cells[name]) for name, latent in self.latent.items()}
        saliency = {name: size[self._cells[name]].float() for name, size in sizes.items()}
        within = None if self.splice else self.masks
        self.set_masks(self.pruner.masks(self._fractions[step], within, saliency=saliency, allocation=self.allocation))
        for name, mask in self.masks.items():
            self._threshold_(name, sizes[name], mask)

    def _threshold_(self, name: str, size: Tensor, mask: Tensor) -> None:
        cells = self._cells[name]
        kept = cell_means(mask.double(), cells)[0] > 0.5
        # the smallest cell that stays bounds it: with permuted groups, cells of one size may fall on either side
        largest = float(size[~kept].max()) if bool((~kept).any()) else 0.0
        self.threshold[name] = threshold = min(largest, float(size[kept].min()))
        shrunk = self.operator(size, threshold).clamp(min=0.0) / size.clamp(min=1e-30)
        factor = torch.where(kept, 1.0 + self.relaxation * (shrunk - 1.0), 1.0 if self.splice else 0.0)
        self.latent[name].mul_(factor[cells].float())

    def signals(self) -> Signals:
        signals = super().signals()
        thresholds = {f"threshold/{name}": value for name, value in self.threshold.items()}
        return replace(signals, scalars={**signals.scalars, **thresholds})
