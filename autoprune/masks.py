"""Masked models: dense weights with zeros. A plan becomes masks, masks are applied, zeros are counted.

A mask is applied by zeroing the weight itself, so code that reads a weight behind its module's back (a fused
operator, weight sharing, an exporter) sees the pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.criteria import CRITERIA, LayerStatistics
from autoprune.errors import AutopruneError
from autoprune.inventory import Inventory, as_tuple, watch_forward
from autoprune.patterns import PATTERNS
from autoprune.plan import Plan

Masks = dict[str, Tensor]  # layer name -> bool, True keeps, in the weight's shape
Batches = Iterable[tuple[Any, Tensor]]  # (inputs, target); inputs a tensor or a tuple
Loss = Callable[[Any, Tensor], Tensor]


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight parameter of the layer called `name`."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def collect_statistics(
    model: nn.Module, names: Iterable[str], batches: Batches, loss: Loss, needs: Iterable[str]
) -> dict[str, LayerStatistics]:
    """One calibration pass: what the criteria's `needs` ask for, per layer. The model is left as it was."""
    names, wanted = list(names), frozenset(needs)
    if not wanted:
        return {name: LayerStatistics() for name in names}
    modules = {name: model.get_submodule(name) for name in names}
    gradient = {name: torch.zeros_like(weight_of(model, name)) for name in names}
    squares: dict[str, Tensor] = {}

    def seen(name: str, args: tuple[Any, ...], _: Any) -> None:
        x = args[0].detach()
        axis = 1 if isinstance(modules[name], nn.Conv2d) else x.ndim - 1
        total = x.double().square().sum(dim=[d for d in range(x.ndim) if d != axis])  # (in,)
        squares[name] = squares.get(name, torch.zeros_like(total)) + total

    was_training = model.training
    model.eval()  # batch norm must not drift
    try:
        with watch_forward(modules, seen):
            for inputs, target in batches:
                if "gradient" in wanted:
                    _add_gradients(model, gradient, loss, inputs, target)
                else:
                    with torch.no_grad():
                        model(*as_tuple(inputs))
    finally:
        model.train(was_training)
    if missing := [name for name in names if name not in squares]:
        raise AutopruneError(f"calibration never reached {', '.join(missing)}: give batches that run the whole model.")
    return {name: LayerStatistics(gradient=gradient[name], input_norm=squares[name].sqrt().float()) for name in names}


def _add_gradients(model: nn.Module, into: dict[str, Tensor], loss: Loss, inputs: Any, target: Tensor) -> None:
    names = list(into)
    with torch.enable_grad():
        value = loss(model(*as_tuple(inputs)), target)
        grads = torch.autograd.grad(value, [weight_of(model, name) for name in names], allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        if grad is not None:
            into[name] += grad.abs()


def criteria_needs(plan: Plan) -> frozenset[str]:
    """The statistics that the criteria of `plan` read."""
    return frozenset().union(*(CRITERIA.get(layer.criterion.name).needs for layer in plan.layers.values()))


def make_masks(
    model: nn.Module,
    inventory: Inventory,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    fraction: float = 1.0,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Turns a plan into one mask a planned layer; layers at sparsity 0 get none.

    Args:
        model: whose weights are scored.
        inventory: its prunable layers.
        plan: per-layer sparsity, pattern and criterion.
        statistics: of each planned layer, as its criterion needs.
        fraction: of the plan's sparsities, in [0, 1].
        within: earlier masks of the same plan; what they cut stays cut.

    Raises:
        ConfigError: the plan names a layer the model does not have.
        AutopruneError: `fraction` is out of range.
    """
    if not 0.0 <= fraction <= 1.0:
        raise AutopruneError(f"a fraction of a plan must be in [0, 1], not {fraction}.")
    plan.check_layers(inventory.names)
    before = within or {}
    masks: Masks = {}
    for name, layer in plan.layers.items():
        if layer.sparsity * fraction <= 0.0:
            continue
        groups = inventory[name].conv_groups
        criterion = CRITERIA.create(layer.criterion)
        saliency = criterion.saliency(weight_of(model, name), statistics[name], groups)
        masks[name] = PATTERNS.create(layer.pattern).mask(
            saliency, layer.sparsity * fraction, groups, within=before.get(name), final_sparsity=layer.sparsity
        )
    return masks


def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Zeroes the weights the masks cut, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight_of(model, name).mul_(mask)
    return model


def sparsity(mask: Tensor) -> float:
    """Fraction of zeros of a mask (or of a weight), in [0, 1]."""
    return 1.0 - int(torch.count_nonzero(mask)) / mask.numel()


def nonzero_parameters(model: nn.Module) -> int:
    """Parameters that are not zero, biases and norms included."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())
