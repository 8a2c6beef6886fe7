"""Gradual: sparsity rises along a cubic while the model trains (Zhu and Gupta 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.allocation import make_allocation
from autoprune.checks import check_counts, check_numbers
from autoprune.training.base import Pruner, SparseTraining
from autoprune.training.schedule import CUBIC, check_span, cuts


class Gradual(SparseTraining):
    """Cuts a little more at each of `updates` evenly spaced steps; what is cut stays cut.

    Args:
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the plan's sparsities are reached, in (begin, 1].
        updates: how often the masks are made anew, >= 1.
        exponent: of the rise, in [0.1, 10]; 1 is even, 3 cubic, more cuts earlier.
        allocation: what shares the plan's budget among the layers: a name, or a table with its arguments.
    """

    strength_range = ("end", 0.2, 0.9)

    def __init__(
        self,
        begin: float = 0.0,
        end: float = 0.5,
        updates: int = 20,
        exponent: float = CUBIC,
        allocation: str | Mapping[str, Any] = "planned",
    ) -> None:
        check_span("gradual", begin, end)
        check_counts("training method 'gradual'", {"updates": updates})
        check_numbers("training method 'gradual'", {"exponent": exponent}, 0.1, 10.0)
        self.begin, self.end, self.updates, self.exponent = begin, end, updates, exponent
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares
        self._fractions: dict[int, float] = {}  # step -> fraction of the plan's sparsities

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner = pruner
        self.masks = {}
        self._fractions = cuts(self.begin, self.end, self.updates, total_steps, self.exponent)

    def after_step(self, step: int) -> None:
        if step in self._fractions:
            # the step moved weights that are cut; zero them before they are scored
            self.pruner.apply_(self.masks)
            self.masks = self.pruner.masks(self._fractions[step], within=self.masks, allocation=self.allocation)
        self.pruner.apply_(self.masks)
