"""Laws of every criterion: scores are non-negative, finite, in the weight's shape, and the same every time."""

from __future__ import annotations

from dataclasses import fields

import torch

from autoprune.criteria.base import Criterion, LayerStatistics
from autoprune.masks import collect_statistics
from autoprune.model.weights import weight_of
from autoprune.testing.cases import LOSS, conv_net, copied, inventory_of_conv_net, random_batches, same_tensors
from autoprune.testing.law import require


def check_criterion(criterion: Criterion) -> None:
    """Checks a criterion on a convolution, a grouped convolution and a Linear.

    Raises:
        BrokenLaw: the criterion breaks a law; the message says which.
    """
    known = {field.name for field in fields(LayerStatistics)}
    require(set(criterion.needs) <= known, criterion, f"needs statistics among {', '.join(sorted(known))}")
    model = conv_net()
    before = copied(model.state_dict())
    inventory = inventory_of_conv_net(model)
    scores = []
    for _ in range(2):
        statistics = collect_statistics(model, inventory.names, random_batches(2), LOSS, criterion.needs)
        scores.append(
            [
                criterion.saliency(weight_of(model, layer.name), statistics[layer.name], layer.conv_groups)
                for layer in inventory.layers
            ]
        )
    for layer, first, second in zip(inventory.layers, *scores, strict=True):
        case = f"for a weight of shape {layer.weight_shape} in {layer.conv_groups} groups"
        require(tuple(first.shape) == layer.weight_shape, criterion, f"returns scores in the weight's shape, {case}")
        require(bool(torch.isfinite(first).all()), criterion, f"returns finite scores, {case}")
        require(bool((first >= 0).all()), criterion, f"returns scores >= 0, {case}")
        require(torch.equal(first, second), criterion, f"returns the same scores every time, {case}")
    require(same_tensors(before, model.state_dict()), criterion, "leaves the weights as they were")
