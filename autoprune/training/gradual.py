"""Gradual: sparsity rises along a cubic while the model trains (Zhu and Gupta 2017)."""

from __future__ import annotations

import math

from autoprune.errors import ConfigError
from autoprune.training.base import Pruner, SparseTraining


class Gradual(SparseTraining):
    """Cuts a little more at each of `updates` evenly spaced steps; what is cut stays cut.

    Args:
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the plan's sparsities are reached, in (begin, 1].
        updates: how often the masks are made anew, >= 1.
    """

    def __init__(self, begin: float = 0.0, end: float = 0.6, updates: int = 20) -> None:
        if not 0.0 <= begin < end <= 1.0:
            raise ConfigError(f"training method 'gradual' needs 0 <= begin < end <= 1, not begin={begin}, end={end}.")
        if not isinstance(updates, int) or isinstance(updates, bool) or updates < 1:
            raise ConfigError(f"training method 'gradual': updates must be an integer >= 1, not {updates!r}.")
        self.begin, self.end, self.updates = begin, end, updates
        self._fractions: dict[int, float] = {}  # step -> fraction of the plan's sparsities

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner = pruner
        self.masks = {}
        first = min(math.floor(self.begin * total_steps), total_steps - 1)
        last = max(first + 1, math.floor(self.end * total_steps))
        steps = {first + math.ceil((last - first) * i / self.updates) for i in range(1, self.updates + 1)}
        self._fractions = {step: 1.0 - (1.0 - (step - first) / (last - first)) ** 3 for step in sorted(steps)}

    def after_step(self, step: int) -> None:
        if step in self._fractions:
            # the step moved weights that are cut; zero them before they are scored
            self.pruner.apply_(self.masks)
            self.masks = self.pruner.masks(self._fractions[step], within=self.masks)
        self.pruner.apply_(self.masks)
