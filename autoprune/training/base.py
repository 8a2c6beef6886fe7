"""What a sparse-training method is: hooks around the one loop, and the pruner they cut with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from autoprune.inventory import Inventory
from autoprune.masks import Batches, Loss, Masks, apply_masks_, collect_statistics, criteria_needs, make_masks
from autoprune.plan import Plan


@dataclass(frozen=True)
class Pruner:
    """A model and the plan it is pruned to.

    Attributes:
        model: the model in training; `apply_` zeroes its weights.
        inventory: the model's prunable layers.
        plan: what to prune, per layer.
        batches: calibration batches, read only when a criterion of the plan needs statistics.
        loss: the task's loss, for criteria that read gradients.
    """

    model: nn.Module
    inventory: Inventory
    plan: Plan
    batches: Batches
    loss: Loss

    def masks(self, fraction: float = 1.0, within: Mapping[str, Tensor] | None = None) -> Masks:
        """Masks of the model as it is now, each layer at `fraction` of its planned sparsity.

        Args:
            fraction: in [0, 1]; 0 gives no masks, 1 the plan's own sparsities.
            within: earlier masks of the same plan; what they cut stays cut.

        Raises:
            AutopruneError: `fraction` out of range, or the plan does not fit the model.
        """
        needs = criteria_needs(self.plan) if fraction > 0.0 else frozenset()
        statistics = collect_statistics(self.model, self.plan.layers, self.batches, self.loss, needs)
        return make_masks(self.model, self.inventory, self.plan, statistics, fraction, within)

    def apply_(self, masks: Mapping[str, Tensor]) -> None:
        """Zeroes the weights of the model that `masks` cut."""
        apply_masks_(self.model, masks)


class SparseTraining(ABC):
    """A way to reach a plan while training. The loop calls `start`, `after_step` ..., `finish`, in that order.

    Attributes:
        pruner: the model and its plan, from `start` on.
        masks: what is cut now; True keeps. Reapplied by the method after every optimizer step.
    """

    pruner: Pruner
    masks: Masks

    @abstractmethod
    def start(self, pruner: Pruner, total_steps: int) -> None:
        """Prepares for `total_steps` optimizer steps; may cut already. Sets `pruner` and `masks`."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Follows each optimizer step, counted from 1; the weights have just moved."""

    @final
    def finish(self) -> Masks:
        """The masks the model now satisfies: the plan's."""
        return self.masks

    def state(self) -> dict[str, Tensor]:
        """What a killed run must know to go on bit for bit."""
        return dict(self.masks)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, after `start`."""
        self.masks = dict(state)
