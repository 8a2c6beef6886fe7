"""Layer-sparse adaptive group-wise pruning: the layers' shares emerge from one competition, and what is cut can return.

Dense weights stay behind the mask, and the gradients of all of them are followed, straight through. Every few steps the
cells of the whole model compete for the budget, by their present size and by where they are heading. What is cut keeps
its value by default, weight decay and momentum aside: nothing answers the moves of a weight that is not in use, and
where such weights moved at full strength, training ended far below that of a gradual schedule.

With a `power` of 3 and `through` between 0 and 1 it thresholds as Feather does (Glentis Georgoulakis et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.checks import check_counts, check_numbers
from autoprune.patterns.base import cell_means, cell_sizes
from autoprune.training.latent import LatentTraining
from autoprune.training.schedule import CUBIC, check_span, cuts

BELOW = 0.99  # the largest threshold, over the size of the smallest cell that is kept: none becomes zero


def shrinkage(latent: Tensor, mask: Tensor, cells: Tensor, power: float) -> Tensor:
    """The factor on each weight that takes its cell's size to ``(size^power - threshold^power)^(1/power)``.

    A size is the root mean square of a cell's weights; the threshold is the size of the largest cell that is cut. A
    power of 1 is soft thresholding; the higher it is, the less is taken from what is large.

    Args:
        latent: dense weight.
        mask: what is kept of it.
        cells: of each weight.
        power: >= 1.

    Returns:
        Factors in (0, 1] in the weight's shape; 1 where the cell is cut.
    """
    size = cell_sizes(latent, cells)
    kept = cell_means(mask.double(), cells)[0] > 0.5
    if bool(kept.all()) or not bool(kept.any()):
        return torch.ones_like(latent)
    threshold = torch.minimum(size[~kept].max(), BELOW * size[kept].min())
    factor = (1.0 - (threshold / size.clamp(min=1e-30)).clamp(max=1.0) ** power) ** (1.0 / power)
    return torch.where(kept, factor, 1.0)[cells].to(latent.dtype)


class Adaptive(LatentTraining):
    """Cuts the cells that are small and not about to grow, wherever they are; cells that were cut may come back.

    A weight's saliency is ``max(0, |w| + look_ahead * drift)``: its size, and how far the coming steps would carry it
    outwards. ``drift`` is the moving average of the weight's own movement along its sign, gradient and decay included,
    so it needs no learning rate. A weight that is cut drifts as its gradient would move it: by as much a unit of
    gradient as the kept weights of its layer have just moved.

    Args:
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the whole budget is met, in (begin, 1].
        freeze: fraction of the run after which the masks stay as they are, in [end, 1].
        updates: competitions between `begin` and `end`, evenly spaced, >= 1; they go on at that pace until `freeze`.
        exponent: of the rise, in [0.1, 10]; 1 is even, 3 cubic, more cuts earlier.
        through: part of its gradient that moves a weight that is cut, in [0, 1].
        look_ahead: steps that the drift is followed for, >= 0; 0 ranks by size alone, and was as good in what we ran.
        memory: of the moving average, in [0, 1).
        allocation: how cells compare between layers: a name, or a table with its arguments. LAMP ended 0.4 to 1
            point above a saliency over its layer's mean, which leaves the layers about alike.
        power: of the thresholding (`shrinkage`), in [1, 100]: what is kept grows from near zero as it comes back. None
            shrinks nothing.
    """

    strength_range = ("look_ahead", 1.0, 50.0)

    def __init__(
        self,
        begin: float = 0.0,
        end: float = 0.5,
        freeze: float = 0.75,
        updates: int = 20,
        exponent: float = CUBIC,
        through: float = 0.0,
        look_ahead: float = 0.0,
        memory: float = 0.95,
        allocation: str | Mapping[str, Any] = "lamp",
        power: float | None = None,
    ) -> None:
        check_span("adaptive", begin, end, freeze)
        check_counts("training method 'adaptive'", {"updates": updates})
        check_numbers("training method 'adaptive'", {"exponent": exponent}, 0.1, 10.0)
        check_numbers("training method 'adaptive'", {"through": through}, 0.0, 1.0)
        check_numbers("training method 'adaptive'", {"look_ahead": look_ahead}, 0.0)
        check_numbers("training method 'adaptive'", {"memory": memory}, 0.0, 0.9999)
        if power is not None:
            check_numbers("training method 'adaptive'", {"power": power}, 1.0, 100.0)
        self.power = power
        self.begin, self.end, self.freeze, self.updates = begin, end, freeze, updates
        self.exponent = exponent
        self.through, self.look_ahead, self.memory = through, look_ahead, memory
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def prepare(self) -> None:
        self._fractions = cuts(self.begin, self.end, self.updates, self.total_steps, self.exponent)
        met, frozen = max(self._fractions), int(self.freeze * self.total_steps)
        pace = max(1, round((self.end - self.begin) * self.total_steps / self.updates))
        self._fractions |= dict.fromkeys(range(met + pace, frozen + 1, pace), 1.0)
        self._last = max(self._fractions)  # competition
        self._cells = {name: self.pruner.cells(name) for name in self.latent}
        self.drift = {name: torch.zeros_like(latent) for name, latent in self.latent.items()}
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def effective(self, name: str, latent: Tensor) -> Tensor:
        masked = super().effective(name, latent)
        if self.power is None or name not in self.masks:
            return masked
        return masked * shrinkage(latent, self.masks[name], self._cells[name], self.power)

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        if name in self.masks:
            self._gradients[name] = gradient.clone()
        return torch.where(self.masks[name], gradient, self.through * gradient) if name in self.masks else gradient

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if self.look_ahead and step <= self._last:
            self._before = {name: latent.clone() for name, latent in self.latent.items()}

    def update(self, step: int) -> None:
        for name, before in self._before.items():
            outwards = self._movement(name, before) * before.sign()
            self.drift[name].mul_(self.memory).add_(outwards, alpha=1.0 - self.memory)
        self._before, self._gradients = {}, {}
        if step in self._fractions:
            saliency = {name: self.saliency(name) for name in self.latent}
            self.set_masks(self.pruner.masks(self._fractions[step], saliency=saliency, allocation=self.allocation))

    def _movement(self, name: str, before: Tensor) -> Tensor:
        """The last step of each weight; of those that are cut, what their gradients ask for."""
        moved = self.latent[name] - before
        if name not in self._gradients:
            return moved
        mask, gradient = self.masks[name], self._gradients[name]
        kept = gradient * mask
        pace = -(moved * kept).sum() / kept.square().sum().clamp(min=1e-30)  # least squares of movement on gradient
        return torch.where(mask, moved, -pace.clamp(min=0.0) * gradient)

    def saliency(self, name: str) -> Tensor:
        """Scores >= 0 in the weight's shape."""
        return (self.latent[name].abs() + self.look_ahead * self.drift[name]).clamp(min=0.0)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"drift.{name}": drift for name, drift in self.drift.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for name, drift in self.drift.items():
            drift.copy_(state[f"drift.{name}"])
