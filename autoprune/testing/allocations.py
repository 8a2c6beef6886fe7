"""Laws of every allocation: the budget is met, closely, on any pattern, and more is cut as the fraction rises."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from autoprune.allocation import Allocation, Layers, MacsCost, WeightCost
from autoprune.errors import ConfigError
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.testing.law import require

PATTERN_CHOICES = (Choice("unstructured"), Choice("group", {"size": 4}), Choice("filter"))


def check_allocation(allocation: Allocation, *, examples: int = 50, seed: int = 0) -> None:
    """Checks an allocation on random budgets, in weights and in multiply-accumulates, of a small network.

    Args:
        allocation: what is checked.
        examples: how many budgets.
        seed: of the budgets.

    Raises:
        BrokenLaw: the allocation breaks a law; the message says which.
    """
    draws = random.Random(seed)
    for _ in range(examples):
        sparsities = [draws.choice((0.0, draws.uniform(0.0, 0.97))) for _ in range(3)]
        layers = layers_to_share(sparsities, draws.choice(PATTERN_CHOICES), macs=draws.random() < 0.5)
        check_shares(allocation, layers, draws.random(), draws.random())
    layers = layers_to_share([0.9, 0.5, 0.0], Choice("unstructured"))
    require(allocation.sparsities(layers, 0.0) == layers.planned(0.0), allocation, "cuts nothing at a fraction of 0")
    if allocation.finds_shares:
        check_budget_is_spent(allocation)
        check_one_sparsity_is_refused(allocation)


def layers_to_share(sparsities: Sequence[float], pattern: Choice, macs: bool = False) -> Layers:
    """Two convolutions and a Linear that share a budget.

    Args:
        sparsities: of the three layers, in [0, 1); what they cut is the budget.
        pattern: of all three.
        macs: whether the budget counts multiply-accumulates, not weights.
    """
    model, inventory = _network()
    plan = Plan({name: LayerPlan(s, pattern) for name, s in zip(inventory.names, sparsities, strict=True)})
    saliency = {name: model.get_parameter(f"{name}.weight").detach().abs() for name in inventory.names}
    return Layers(inventory, plan, saliency, MacsCost(inventory) if macs else WeightCost(inventory))


def check_shares(allocation: Allocation, layers: Layers, one: float, other: float) -> None:
    """Checks an allocation of one budget, at two fractions of it, each in [0, 1].

    Raises:
        BrokenLaw: the allocation breaks a law.
    """
    low, high = sorted((one, other))
    shares = {fraction: allocation.sparsities(layers, fraction) for fraction in (low, high)}
    for fraction, found in shares.items():
        case = f"at {fraction} of { ({name: layer.sparsity for name, layer in layers.plan.layers.items()}) }"
        require(set(found) == set(layers.planned(1.0)), allocation, f"leaves out layers planned dense alone, {case}")
        require(all(0.0 <= share < 1.0 for share in found.values()), allocation, f"has sparsities in [0, 1), {case}")
        if allocation.finds_shares:
            least = layers.cost(_of_masks(layers, dict.fromkeys(found, 0.9999)))
            budget = layers.cost(layers.planned(fraction))
            spent = layers.cost(_of_masks(layers, found))
            require(spent <= max(least, budget * (1 + 1e-6)), allocation, f"stays within the budget, {case}")
    rises = all(shares[low][name] <= shares[high][name] + 1e-9 for name in shares[low])
    require(rises, allocation, f"cuts no layer less as the fraction rises from {low} to {high}")


def check_budget_is_spent(allocation: Allocation) -> None:
    """Checks that an allocation keeps about as much as it may, in weights and in multiply-accumulates.

    Raises:
        BrokenLaw: it cuts more.
    """
    for macs in (False, True):
        layers = layers_to_share([0.9, 0.9, 0.9], Choice("unstructured"), macs)
        cost, budget = layers.cost(allocation.sparsities(layers)), layers.cost(layers.planned(1.0))
        require(abs(cost - budget) <= 0.02 * budget, allocation, f"spends its budget of {budget:g}, not {cost:g}")


def check_one_sparsity_is_refused(allocation: Allocation) -> None:
    """Checks that an allocation refuses a pattern whose layers can have one sparsity alone.

    Raises:
        BrokenLaw: it shares a budget that cannot be shared.
    """
    try:
        allocation.sparsities(layers_to_share([0.5, 0.5, 0.5], Choice("n:m")))
    except ConfigError:
        return
    require(False, allocation, "raises ConfigError for a pattern that allows one sparsity alone (`Layers.check_free`)")


def _network() -> tuple[nn.Module, Inventory]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(128, 24))
    return model, take_inventory(model, torch.zeros(1, 4, 6, 6))


def _of_masks(layers: Layers, shares: Mapping[str, float]) -> dict[str, float]:
    """The sparsities of the masks: whole cells, one of each layer kept at least."""
    rules = {name: PATTERNS.create(layers.plan.layers[name].pattern) for name in shares}
    return {n: rules[n].feasible(layers.inventory[n].weight_shape, share) for n, share in shares.items()}
