"""One shot: cut everything before the first step, then train what is left (Han et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.allocation import make_allocation
from autoprune.training.base import Pruner, SparseTraining


class OneShot(SparseTraining):
    """The masks are made once, from the model as it starts, and hold to the end.

    Args:
        allocation: what shares the plan's budget among the layers: a name, or a table with its arguments.
    """

    def __init__(self, allocation: str | Mapping[str, Any] = "planned") -> None:
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner = pruner
        self.masks = pruner.masks(allocation=self.allocation)
        pruner.apply_(self.masks)

    def after_step(self, step: int) -> None:
        self.pruner.apply_(self.masks)
