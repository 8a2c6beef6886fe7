"""Plans become masks; masks become zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.criteria import LayerStatistics
from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import apply_masks_, collect_statistics, filter_rows, make_masks, nonzero_parameters, sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.testing import small_cnn


def test_masks_have_the_planned_pattern_and_sparsity() -> None:
    model = small_cnn()
    inventory = take_inventory(model, torch.zeros(1, 3, 16, 16))
    plan = Plan({name: LayerPlan(0.75, Choice("group", {"size": 8})) for name in inventory.names[:-1]})
    masks = make_masks(model, inventory, plan, {name: LayerStatistics() for name in inventory.names})
    before = nonzero_parameters(model)
    apply_masks_(model, masks)
    assert nonzero_parameters(model) < before
    for name, mask in masks.items():
        assert sparsity(mask) == pytest.approx(0.75, abs=0.02)
        assert sparsity(weight_of(model, name)) == pytest.approx(sparsity(mask))
        assert PATTERNS.create(Choice("group", {"size": 8})).check(mask)


def test_a_layer_left_dense_gets_no_mask() -> None:
    model = small_cnn()
    inventory = take_inventory(model, torch.zeros(1, 3, 16, 16))
    assert make_masks(model, inventory, Plan({"0": LayerPlan(0.0, Choice("group"))}), {}) == {}


def test_a_plan_for_another_model_is_refused() -> None:
    model = small_cnn()
    inventory = take_inventory(model, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match="does not have"):
        make_masks(model, inventory, Plan({"conv9": LayerPlan(0.5, Choice("group"))}), {})


def test_calibration_that_misses_a_layer_is_an_error() -> None:
    model = small_cnn()
    with pytest.raises(AutopruneError, match="never reached"):
        collect_statistics(model, ["0"], [], torch.nn.functional.cross_entropy, {"gradient"})


def test_a_filter_cut_as_a_whole_falls_silent() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 9))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 1.0, 2.0)
    inventory = take_inventory(model, torch.zeros(1, 3, 5, 5))
    assert list(filter_rows(model, inventory["0"])) == ["0.bias", "1.weight", "1.bias"]
    assert list(filter_rows(model, inventory["2"])) == ["2.bias"]
    masks = {name: torch.ones_like(weight_of(model, name), dtype=torch.bool) for name in inventory.names}
    for name in inventory.names:
        masks[name][[1, 4]] = False
        masks[name][0, 0] = False  # in part: the filter stays
    apply_masks_(model, masks)
    assert all(row.all() for name in inventory.names for row in filter_rows(model, inventory[name]).values())
    apply_masks_(model, masks, inventory)
    for name in inventory.names:
        for row in filter_rows(model, inventory[name]).values():
            assert (row == 0).nonzero().flatten().tolist() == [1, 4]
    output = model[:2].eval()(torch.randn(2, 3, 5, 5))
    assert not output[:, [1, 4]].any()
    assert output[:, [0, 2, 3, 5, 6, 7]].any(dim=3).all()
