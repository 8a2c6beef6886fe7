"""The pruner of a method that may widen the model first, at the budget of the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from autoprune.allocation import Cost, WeightCost
from autoprune.masks import Batches, Loss
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.plan import Plan
from autoprune.training.base import Pruner, SparseTraining


def make_pruner_(
    method: SparseTraining,
    model: nn.Module,
    inventory: Inventory,
    plan: Plan,
    inputs: Any,
    batches: Batches,
    loss: Loss,
    cost: Callable[[Inventory], Cost] = WeightCost,
) -> Pruner:
    """Widens `model` in place if `method` does, and makes the pruner of it; call it before there is an optimizer.

    Args:
        method: that will train the model.
        model: to be pruned.
        inventory: its prunable layers, as they are now.
        plan: its plan.
        inputs: a tensor or a tuple of them, as the model is called; batch as in `inventory`.
        batches: for calibration.
        loss: the task's.
        cost: inventory -> what the budget counts, e.g. `MacsCost`.

    Raises:
        AutopruneError: the method widens, and the model cannot be widened.
    """
    if method.widen_(model, inputs, plan):
        wider = take_inventory(model, inputs, min_weights=1)
        layers = tuple(layer for layer in wider.layers if layer.name in inventory.by_name)
        plan = same_budget(plan, inventory, wider)
        inventory = Inventory(layers, inventory.dense)
    return Pruner(model, inventory, plan, batches, loss, cost(inventory))


def same_budget(plan: Plan, before: Inventory, after: Inventory) -> Plan:
    """The plan of a wider model by which every layer keeps as many weights, and so MACs, as it did before."""
    layers = {}
    for name, layer in plan.layers.items():
        share = before[name].weights / after[name].weights
        # a layer as wide as before keeps its sparsity to the bit
        layers[name] = layer if share == 1.0 else replace(layer, sparsity=1.0 - (1.0 - layer.sparsity) * share)
    return replace(plan, layers=layers)
