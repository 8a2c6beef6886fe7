"""What a sparse-training method is: hooks around the one loop, and the pruner they cut with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from autoprune.allocation import Allocation, Cost, Layers, WeightCost, layer_cells
from autoprune.allocation.planned import Planned
from autoprune.criteria import LayerStatistics
from autoprune.errors import AutopruneError
from autoprune.masks import (
    Batches,
    Loss,
    Masks,
    apply_masks_,
    collect_statistics,
    criteria_needs,
    cut_by_criteria,
    cut_layers,
    score_layers,
    sparsity,
)
from autoprune.model.inventory import Inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Pruner:
    """A model and the plan it is pruned to.

    Attributes:
        model: the model in training; `apply_` zeroes its weights.
        inventory: the model's prunable layers.
        plan: what to prune, per layer. Methods that find the layers' shares themselves read its cost alone: they may
            spend the same budget elsewhere.
        batches: calibration batches, read only when statistics are needed.
        loss: the task's loss, for criteria that read gradients.
        cost: what the plan's budget counts; the weights left when None.
    """

    model: nn.Module
    inventory: Inventory
    plan: Plan
    batches: Batches
    loss: Loss
    cost: Cost | None = None

    @cached_property
    def layers(self) -> dict[str, LayerPlan]:
        """The layers to prune: those the plan gives a sparsity above 0."""
        return {name: layer for name, layer in self.plan.layers.items() if layer.sparsity > 0.0}

    def weight(self, name: str) -> Tensor:
        """The weight parameter of a layer."""
        return weight_of(self.model, name)

    def cells(self, name: str) -> Tensor:
        """The cell of each weight of a layer, int64 from 0, in the weight's shape."""
        return layer_cells(self.inventory, self.plan, name)

    def saliency(self) -> dict[str, Tensor]:
        """Scores of the model as it is now, by each layer's criterion."""
        return score_layers(self.model, self.inventory, self.plan, self._statistics())

    def _statistics(self) -> dict[str, LayerStatistics]:
        needs = criteria_needs(self.plan)
        return collect_statistics(self.model, self.plan.layers, self.batches, self.loss, needs)

    def masks(
        self,
        fraction: float = 1.0,
        within: Mapping[str, Tensor] | None = None,
        *,
        saliency: Mapping[str, Tensor] | None = None,
        allocation: Allocation | None = None,
    ) -> Masks:
        """Masks of the model as it is now, at `fraction` of the plan.

        Args:
            fraction: of the plan's sparsities, in [0, 1]; 0 gives no masks.
            within: earlier masks of the same plan; what they cut stays cut.
            saliency: layer -> scores >= 0 in the weight's shape, in place of the criteria's.
            allocation: shares the budget of `fraction` of the plan; each layer has its own when None.

        Raises:
            AutopruneError: `fraction` out of range, or the plan does not fit the model.
        """
        if not 0.0 <= fraction <= 1.0:
            raise AutopruneError(f"a fraction of a plan must be in [0, 1], not {fraction}.")
        self.plan.check_layers(self.inventory.names)
        if fraction == 0.0:
            return {}
        statistics = self._statistics() if saliency is None else {}
        scores = score_layers(self.model, self.inventory, self.plan, statistics) if saliency is None else dict(saliency)
        ranked = scores
        if within:
            ranked = {n: s.masked_fill(~within[n], -1.0) if n in within else s for n, s in scores.items()}
        layers = Layers(self.inventory, self.plan, ranked, self.cost or WeightCost(self.inventory))
        shares = (allocation or Planned()).sparsities(layers, fraction)
        final = {name: layer.sparsity for name, layer in self.layers.items()}
        if saliency is not None:
            return cut_layers(scores, self.inventory, self.plan, shares, within, final)
        return cut_by_criteria(self.model, self.inventory, self.plan, statistics, scores, shares, within, final)

    def apply_(self, masks: Mapping[str, Tensor]) -> None:
        """Zeroes the weights of the model that `masks` cut; filters cut as a whole fall silent."""
        apply_masks_(self.model, masks, self.inventory)


@dataclass(frozen=True)
class Signals:
    """What a method shows of itself: TensorBoard tag -> figure, or values of a histogram."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)


class SparseTraining(ABC):
    """A way to reach a plan while training; constructed from JSON values, its arguments.

    The loop calls ``start``, then at every optimizer step ``before_step`` (gradients are there) and ``after_step``
    (weights have moved), then ``finish``. Between steps the model holds the masked weights.

    Attributes:
        strength_range: the argument that matters most, and the range an agent may set it in: (name, low, high). Ranges
            above 0 that span a factor of ten or more are walked on a log scale.
        finds_shares: whether the method spends the plan's budget on the layers as it finds best, rather than as the
            plan says.
        passing: how the names of those parts of the state begin that change their shape.
        pruner: the model and its plan, from `start` on.
        masks: what is cut now; True keeps. Reapplied by the method after every optimizer step.
        distillation_factor: on the settings' distillation weight, of the coming steps; read by `train_` alone.
    """

    strength_range: ClassVar[tuple[str, float, float] | None] = None
    finds_shares: bool = False
    passing: ClassVar[tuple[str, ...]] = ()
    pruner: Pruner
    masks: Masks
    distillation_factor: float = 1.0

    def widen_(self, model: nn.Module, inputs: Any, plan: Plan) -> bool:
        """Widens `model` in place before there is a pruner or an optimizer; False where a method leaves it as it is.

        Only layers that the plan names change their shape. The same arguments always give the same shapes.
        """
        return False

    @abstractmethod
    def start(self, pruner: Pruner, total_steps: int) -> None:
        """Prepares for `total_steps` optimizer steps; may cut already. Sets `pruner` and `masks`."""

    def see_loss(self, value: float) -> None:  # noqa: B027 - most methods read none
        """Precedes `before_step` with the step's loss where `train_` trains; a user's own loop does not tell it."""

    def before_step(self, step: int) -> None:  # noqa: B027 - most methods have nothing to do here
        """Precedes each optimizer step, counted from 1; the gradients are those of the masked model."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Follows each optimizer step, counted from 1; the weights have just moved."""

    def finish(self) -> Masks:
        """The masks the model now satisfies, within the plan's budget."""
        return self.masks

    def signals(self) -> Signals:
        """What to show of the present state: each layer's sparsity, and what the method adds."""
        named = {f"sparsity/{name}": sparsity(mask) for name, mask in self.masks.items()}
        cut = sum(int((~mask).sum()) for mask in self.masks.values())
        planned = sum(self.pruner.inventory[name].weights for name in self.pruner.layers)
        return Signals({"sparsity": cut / planned if planned else 0.0, **named})

    def state(self) -> dict[str, Tensor]:
        """What a killed run must know to go on bit for bit."""
        return dict(self.masks)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, after `start`; `resume` checks it first."""
        self.masks = dict(state)

    @final
    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Takes back a state of this method that comes from elsewhere, after `start`.

        Raises:
            AutopruneError: something has another shape or type than in this model.
            KeyError: it lacks something.
        """
        for name, own in self.state().items():  # an earlier state may hold less, a later one more
            given = own if name.startswith(self.passing) else state.get(name, own)
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                kind, wanted = (f"{tuple(each.shape)} of {each.dtype}" for each in (given, own))
                raise AutopruneError(f"its {name!r} is {kind}, here it is {wanted}")
        self.load_state(state)
        for name, mask in self.masks.items():  # a layer has none before its first cut
            if name not in self.pruner.layers:
                raise AutopruneError(f"it has a mask of {name!r}, which is not pruned")
            if (mask.shape, mask.dtype) != (self.pruner.weight(name).shape, torch.bool):
                raise AutopruneError(f"its mask of {name!r} does not fit the weight")
