"""RigL: sparse from the first step; what is small is dropped, what its gradient asks for grows (Evci et al. 2020).

With random growth it is SET (Mocanu et al. 2018); with a start that is denser than the plan, GraNet (Liu et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.checks import check_counts, check_numbers
from autoprune.errors import ConfigError, did_you_mean
from autoprune.masks import cut_layers, sparsity
from autoprune.patterns import PATTERNS
from autoprune.patterns.base import cell_means
from autoprune.patterns.layered import cells_within
from autoprune.training.latent import LatentTraining
from autoprune.training.schedule import check_span, cuts, rise

GROWTHS = ("gradient", "random")


class Rigl(LatentTraining):
    """At each of `updates` steps the smallest cells are dropped, and as many grow: those with the largest gradients.

    What grows starts as good as at zero. The share that is replaced falls along a cosine, to none at the last update.
    The first masks are made by the plan's criteria; each layer keeps the share that it has in them.

    Args:
        begin: fraction of the run after which updates begin, in [0, 1).
        end: fraction of the run after which the masks stay as they are, in (begin, 1].
        updates: how often cells are replaced, evenly spaced, >= 1.
        replaced: share of the kept weights that the first updates replace, in [0, 1].
        growth: ``gradient``, or ``random``.
        start: fraction of the plan's sparsities at the start, in [0, 1]; they rise to the plan's along a cubic.
        allocation: what shares the plan's budget among the layers: a name, or a table with its arguments.
    """

    strength_range = ("replaced", 0.05, 0.5)

    def __init__(
        self,
        begin: float = 0.0,
        end: float = 0.75,
        updates: int = 30,
        replaced: float = 0.3,
        growth: str = "gradient",
        start: float = 1.0,
        allocation: str | Mapping[str, Any] = "planned",
    ) -> None:
        check_span("rigl", begin, end)
        check_counts("training method 'rigl'", {"updates": updates})
        check_numbers("training method 'rigl'", {"replaced": replaced, "start": start}, 0.0, 1.0)
        if growth not in GROWTHS:
            raise ConfigError(
                f"training method 'rigl': unknown growth {growth!r}. {did_you_mean(str(growth), GROWTHS)}"
            )
        self.begin, self.end, self.updates = begin, end, updates
        self.replaced, self.growth, self.start_fraction = replaced, growth, start
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def prepare(self) -> None:
        self._progress = cuts(self.begin, self.end, self.updates, self.total_steps, exponent=1.0)
        self._looks = False
        self._gradients: dict[str, Tensor] = {}
        scores = self.pruner.saliency()
        self.shares = {name: layer.sparsity for name, layer in self.pruner.layers.items()}
        if self.finds_shares:
            first = self.pruner.masks(saliency=scores, allocation=self.allocation)
            self.shares = {name: sparsity(first[name]) if name in first else 0.0 for name in self.shares}
        self._cut(scores, 0.0)

    def before_step(self, step: int) -> None:
        self._looks = step in self._progress
        super().before_step(step)

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        if name not in self.masks:
            return gradient
        if self._looks:
            self._gradients[name] = gradient.abs()
        return gradient * self.masks[name]

    def update(self, step: int) -> None:
        self.restart_()  # momentum moved what is cut
        if step in self._progress:
            progress = self._progress[step]
            self._cut({name: self._scores(name, progress) for name in self.latent}, progress)
        self._gradients = {}

    def _cut(self, scores: Mapping[str, Tensor], progress: float) -> None:
        """Makes masks of `scores`; the last ones, by which nothing grows, within those before them."""
        sparsities = {name: self._sparsity(name, progress) for name in self.shares}
        within = self.masks if progress == 1.0 else None
        self.set_masks(cut_layers(scores, self.pruner.inventory, self.pruner.plan, sparsities, within, self.shares))
        self.restart_()

    def _sparsity(self, name: str, progress: float) -> float:
        risen = self.start_fraction + (1.0 - self.start_fraction) * rise(progress)
        return self.shares[name] * min(1.0, risen)

    def _scores(self, name: str, progress: float) -> Tensor:
        """What is kept as it is, from 2 on by its size; the rest, up to 1, by how much it asks to grow."""
        size = self.latent[name].abs()
        if name not in self.masks:
            return size
        mask, layer = self.masks[name], self.pruner.inventory[name]
        pattern = PATTERNS.create(self.pruner.layers[name].pattern)
        cells = cells_within(pattern, layer, size, mask)
        sizes, weights = cell_means(size, cells)
        alive = cell_means(mask.double(), cells)[0] > 0.5
        replaced = self.replaced * (1.0 + math.cos(math.pi * progress)) / 2
        stay = (1.0 - replaced) * (1.0 - self._sparsity(name, progress)) * mask.numel()
        order = torch.where(alive, sizes, -1.0).argsort(descending=True, stable=True)
        stays = torch.zeros_like(alive)
        stays[order] = weights[order].cumsum(0) <= round(stay)
        sizes = sizes / sizes.max().clamp(min=1e-30)
        # where nothing asks to grow, what is there stays
        others = self._asked(name, cells, len(sizes)) + 1e-9 * sizes * alive
        return torch.where(stays & alive, 2.0 + sizes, others)[cells]

    def _asked(self, name: str, cells: Tensor, count: int) -> Tensor:
        """How much each cell asks to grow, in [0, 1], ``(cells,)``."""
        if self.growth == "random":
            return torch.rand(count, dtype=torch.float64)
        if name not in self._gradients:
            return torch.zeros(count, dtype=torch.float64)
        asked, _ = cell_means(self._gradients[name], cells)
        return asked / asked.max().clamp(min=1e-30)

    def state(self) -> dict[str, Tensor]:
        shares = {f"share.{name}": torch.tensor(share, dtype=torch.float64) for name, share in self.shares.items()}
        return super().state() | shares

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.shares = {name: float(state[f"share.{name}"]) for name in self.shares}
        super().load_state(state)
