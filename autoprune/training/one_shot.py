"""One shot: cut everything before the first step, then train what is left (Han et al. 2015)."""

from __future__ import annotations

from autoprune.training.base import Pruner, SparseTraining


class OneShot(SparseTraining):
    """The masks are made once, from the model as it starts, and hold to the end."""

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner = pruner
        self.masks = pruner.masks()
        pruner.apply_(self.masks)

    def after_step(self, step: int) -> None:
        self.pruner.apply_(self.masks)
