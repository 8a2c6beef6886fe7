"""Laws of every allocation: the budget is met, closely, on any pattern, and more is cut as the fraction rises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.allocation import ALLOCATIONS, Layers, MacsCost
from autoprune.errors import ConfigError
from autoprune.registry import Choice
from autoprune.testing import check_allocation
from autoprune.testing.allocations import PATTERN_CHOICES, check_shares, layers_to_share

FREE = ["uniform", "erk", "global", "lamp"]


def test_every_allocation_is_covered() -> None:
    assert {*FREE, "planned"} == set(ALLOCATIONS)
    assert [name for name in ALLOCATIONS if ALLOCATIONS.get(name).finds_shares] == FREE


@pytest.mark.parametrize("name", list(ALLOCATIONS))
@given(
    sparsities=st.lists(st.floats(0.0, 0.97), min_size=3, max_size=3),
    pattern=st.sampled_from(PATTERN_CHOICES),
    fractions=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    macs=st.booleans(),
)
def test_the_budget_is_met(
    name: str, sparsities: list[float], pattern: Choice, fractions: tuple[float, float], macs: bool
) -> None:
    check_shares(ALLOCATIONS.create(Choice(name)), layers_to_share(sparsities, pattern, macs), *fractions)


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_every_allocation_keeps_the_laws(name: str) -> None:
    check_allocation(ALLOCATIONS.create(Choice(name)), examples=10)


def test_a_global_ranking_cuts_the_weak_layer_and_normalising_takes_its_scale_away() -> None:
    found = layers_to_share([0.5, 0.5, 0.5], Choice("unstructured"))
    weak = Layers(found.inventory, found.plan, {**found.saliency, "1": found.saliency["1"] * 1e-3}, found.cost)
    plain, normal = (ALLOCATIONS.create(Choice("global", {"normalise": n})) for n in (False, True))
    assert plain.sparsities(weak)["1"] > 0.5 > plain.sparsities(weak)["0"]
    assert normal.sparsities(weak) == pytest.approx(normal.sparsities(found), abs=1e-6)


def test_the_largest_layer_is_the_sparsest_under_erk() -> None:
    shares = ALLOCATIONS.create(Choice("erk")).sparsities(layers_to_share([0.9, 0.9, 0.9], Choice("unstructured")))
    assert shares["0"] < shares["1"] < 1.0
    assert shares["3"] < shares["1"]


def test_what_is_cut_already_is_cut_first() -> None:
    found = layers_to_share([0.5, 0.5, 0.5], Choice("unstructured"))
    cut = torch.zeros_like(found.saliency["1"], dtype=torch.bool)
    cut[:24] = True
    saliency = {**found.saliency, "1": found.saliency["1"].masked_fill(cut, -1.0)}
    shares = ALLOCATIONS.create(Choice("global")).sparsities(Layers(found.inventory, found.plan, saliency, found.cost))
    assert shares["1"] >= 0.75


@pytest.mark.parametrize("name", FREE)
def test_one_sparsity_leaves_nothing_to_share(name: str) -> None:
    with pytest.raises(ConfigError, match="allows one sparsity alone"):
        ALLOCATIONS.create(Choice(name)).sparsities(layers_to_share([0.5, 0.5, 0.5], Choice("n:m")))


def test_a_reader_that_cuts_a_channel_frees_its_producer() -> None:
    inventory = layers_to_share([0.5, 0.5, 0.5], Choice("unstructured")).inventory
    plain, linked = MacsCost(inventory), MacsCost(inventory, {"0": "1"})
    assert plain({"1": 0.5}) == plain({}) - 0.5 * inventory["1"].macs
    assert linked({"1": 0.5}) == plain({"1": 0.5}) - 0.5 * inventory["0"].macs
