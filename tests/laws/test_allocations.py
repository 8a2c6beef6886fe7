"""Laws of every allocation: the budget is met, closely, on any pattern, and more is cut as the fraction rises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoprune.allocation import ALLOCATIONS, Layers, MacsCost, WeightCost
from autoprune.errors import ConfigError
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice

FREE = ["uniform", "erk", "global", "lamp"]


def network() -> tuple[nn.Module, Inventory]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(128, 24))
    return model, take_inventory(model, torch.zeros(1, 4, 6, 6))


def layers(sparsities: list[float], pattern: Choice, macs: bool = False) -> Layers:
    model, inventory = network()
    plan = Plan({name: LayerPlan(s, pattern) for name, s in zip(inventory.names, sparsities, strict=True)})
    saliency = {name: model.get_submodule(name).weight.detach().abs() for name in inventory.names}
    return Layers(inventory, plan, saliency, MacsCost(inventory) if macs else WeightCost(inventory))


def masked(given_layers: Layers, shares: dict[str, float]) -> dict[str, float]:
    """The sparsities of the masks: whole cells, one of each layer kept at least."""
    rules = {name: PATTERNS.create(given_layers.plan.layers[name].pattern) for name in shares}
    return {n: rules[n].feasible(given_layers.inventory[n].weight_shape, share) for n, share in shares.items()}


def test_every_allocation_is_covered() -> None:
    assert {*FREE, "planned"} == set(ALLOCATIONS)


@pytest.mark.parametrize("name", list(ALLOCATIONS))
@given(
    sparsities=st.lists(st.floats(0.0, 0.97), min_size=3, max_size=3),
    pattern=st.sampled_from([Choice("unstructured"), Choice("group", {"size": 4}), Choice("filter")]),
    fractions=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    macs=st.booleans(),
)
def test_the_budget_is_met(
    name: str, sparsities: list[float], pattern: Choice, fractions: tuple[float, float], macs: bool
) -> None:
    given_layers, rule = layers(sparsities, pattern, macs), ALLOCATIONS.create(Choice(name))
    less, more = sorted(fractions)
    shares = {fraction: rule.sparsities(given_layers, fraction) for fraction in (less, more)}
    for fraction, found in shares.items():
        assert set(found) == set(given_layers.planned(1.0)), "layers that are planned dense take no part"
        assert all(0.0 <= share < 1.0 for share in found.values())
        if name != "planned":
            least = given_layers.cost(masked(given_layers, dict.fromkeys(found, 0.9999)))
            budget = given_layers.cost(given_layers.planned(fraction))
            assert given_layers.cost(masked(given_layers, found)) <= max(least, budget * (1 + 1e-6))
    assert all(shares[less][layer] <= shares[more][layer] + 1e-9 for layer in shares[less])


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_nothing_is_cut_at_no_fraction_of_the_plan(name: str) -> None:
    found = layers([0.9, 0.5, 0.0], Choice("unstructured"))
    assert ALLOCATIONS.create(Choice(name)).sparsities(found, 0.0) == found.planned(0.0)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("macs", [False, True])
def test_the_budget_is_spent(name: str, macs: bool) -> None:
    found = layers([0.9, 0.9, 0.9], Choice("unstructured"), macs)
    shares = ALLOCATIONS.create(Choice(name)).sparsities(found)
    assert found.cost(shares) == pytest.approx(found.cost(found.planned(1.0)), rel=0.02)


def test_a_global_ranking_cuts_the_weak_layer_and_normalising_takes_its_scale_away() -> None:
    found = layers([0.5, 0.5, 0.5], Choice("unstructured"))
    weak = Layers(found.inventory, found.plan, {**found.saliency, "1": found.saliency["1"] * 1e-3}, found.cost)
    plain, normal = (ALLOCATIONS.create(Choice("global", {"normalise": n})) for n in (False, True))
    assert plain.sparsities(weak)["1"] > 0.5 > plain.sparsities(weak)["0"]
    assert normal.sparsities(weak) == pytest.approx(normal.sparsities(found), abs=1e-6)


def test_the_largest_layer_is_the_sparsest_under_erk() -> None:
    shares = ALLOCATIONS.create(Choice("erk")).sparsities(layers([0.9, 0.9, 0.9], Choice("unstructured")))
    assert shares["0"] < shares["1"] < 1.0
    assert shares["3"] < shares["1"]


def test_what_is_cut_already_is_cut_first() -> None:
    found = layers([0.5, 0.5, 0.5], Choice("unstructured"))
    cut = torch.zeros_like(found.saliency["1"], dtype=torch.bool)
    cut[:24] = True
    saliency = {**found.saliency, "1": found.saliency["1"].masked_fill(cut, -1.0)}
    shares = ALLOCATIONS.create(Choice("global")).sparsities(Layers(found.inventory, found.plan, saliency, found.cost))
    assert shares["1"] >= 0.75


@pytest.mark.parametrize("name", FREE)
def test_one_sparsity_leaves_nothing_to_share(name: str) -> None:
    with pytest.raises(ConfigError, match="allows one sparsity alone"):
        ALLOCATIONS.create(Choice(name)).sparsities(layers([0.5, 0.5, 0.5], Choice("n:m")))


def test_a_reader_that_cuts_a_channel_frees_its_producer() -> None:
    _, inventory = network()
    plain, linked = MacsCost(inventory), MacsCost(inventory, {"0": "1"})
    assert plain({"1": 0.5}) == plain({}) - 0.5 * inventory["1"].macs
    assert linked({"1": 0.5}) == plain({"1": 0.5}) - 0.5 * inventory["0"].macs
