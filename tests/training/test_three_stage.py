"""One-shot and gradual pruning with every allocation: the budget is the plan's, the shares the allocation's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.allocation import ALLOCATIONS, Layers, WeightCost, make_allocation
from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_

LOSS = nn.functional.cross_entropy
METHODS = ["one_shot", "gradual"]
GLOBAL = {"name": "global", "normalise": True}


def pruner(pattern: Choice, share: float = 0.75) -> Pruner:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 12))
    inventory = take_inventory(network, torch.zeros(1, 4, 6, 6))
    plan = Plan({name: LayerPlan(share, pattern) for name in inventory.names})
    return Pruner(network, inventory, plan, random_batches(), LOSS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", [*ALLOCATIONS, GLOBAL])
@pytest.mark.parametrize("pattern", [Choice("unstructured"), Choice("group", {"size": 4})])
def test_the_budget_is_shared_as_the_allocation_says(
    method: str, allocation: str | Mapping[str, Any], pattern: Choice
) -> None:
    subject = pruner(pattern)
    start = {name: weight_of(subject.model, name).detach().abs() for name in subject.inventory.names}
    cost = WeightCost(subject.inventory)
    wanted = make_allocation(allocation).sparsities(Layers(subject.inventory, subject.plan, start, cost))
    made = TRAINING.create(Choice(method, {"allocation": allocation}))
    assert made.finds_shares == (allocation != "planned")
    result = train_(
        subject.model, random_batches(), LOSS, TrainingSettings(epochs=3), seed=0, method=made, pruner=subject
    )  # fmt: skip
    assert result.masks is not None
    shares = {name: sparsity(mask) for name, mask in result.masks.items()}
    budget = cost(dict.fromkeys(subject.inventory.names, 0.75))
    assert budget * 0.98 <= cost(shares) <= budget * (1 + 1e-6)
    if method == "one_shot" or allocation in ("planned", "uniform", "erk"):  # the others rank what training made
        assert shares == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("allocation", ["erk", "lamp", GLOBAL])
def test_gradual_only_ever_cuts_whatever_the_shares(allocation: str | Mapping[str, Any]) -> None:
    subject = pruner(Choice("group", {"size": 4}), 0.9)
    method = TRAINING.create(Choice("gradual", {"allocation": allocation, "updates": 10, "end": 1.0}))
    method.start(subject, 20)
    generator = torch.Generator().manual_seed(0)
    before: dict[str, Tensor] = {}
    for step in range(1, 21):
        for name in subject.inventory.names:
            weight = weight_of(subject.model, name).data
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        method.after_step(step)
        assert all(not (mask & ~before[name]).any() for name, mask in method.masks.items() if name in before)
        before = dict(method.masks)
    assert len({round(sparsity(mask), 2) for mask in before.values()}) > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("allocation", "said"),
    [("lampp", "Did you mean 'lamp'?"), ({"name": "global", "normalize": True}, "Did you mean 'normalise'?")],
)
def test_refuses(method: str, allocation: str | Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice(method, {"allocation": allocation}))
    assert said in str(caught.value)
