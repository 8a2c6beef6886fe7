"""What pruned channels and filters leave: trained models lose them for good, and budgets in MACs count it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.allocation import MacsCost
from autoprune.masks import apply_masks_, sparsity
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.repack import capture, find_readers, remaining_macs, repack
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.settings import TrainingSettings
from autoprune.tasks.digits import digits
from autoprune.training import TRAINING, Pruner, train_


class Residual(nn.Module):
    """A stem, a basic block, a bottleneck with a depthwise middle, two branches that one layer reads, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.a_norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.b, self.b_norm = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.deep, self.narrow = (
            nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=32, padding=1, bias=False), nn.Conv2d(32, 16, 1),
        )  # fmt: skip
        self.left, self.right, self.both = nn.Conv2d(16, 12, 1), nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))).relu()
        x = x + self.narrow(self.deep(self.wide(x).relu()).relu())
        x = x + self.both((self.left(x) + self.right(x)).relu())
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8),
    ).eval()  # fmt: skip


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@cache
def whole(build: Callable[[], nn.Module], *shape: int) -> tuple[Inventory, MacsCost]:
    """The inventory of a network that is not pruned yet, and its budget; asked once for all that is cut of it."""
    model, x = build(), torch.randn(shape)
    inventory = take_inventory(model, x)
    cost = MacsCost(inventory, find_readers(model, x))
    assert remaining_macs(model, x) == cost({})
    return inventory, cost


def cut(model: nn.Module, inventory: Inventory, shares: dict[str, float], pattern: str) -> dict[str, float]:
    """Prunes by magnitude, in place; returns the sparsities there are."""
    rule = PATTERNS.create(Choice(pattern))
    masks = {
        name: rule.mask(weight_of(model, name).abs(), share, inventory[name].conv_groups)
        for name, share in shares.items()
    }
    apply_masks_(model, masks, inventory)
    return {name: sparsity(mask) for name, mask in masks.items()}


def test_readers_of_a_plain_network() -> None:
    x = torch.randn(2, 4, 13, 13)
    assert find_readers(plain(), x) == {"0": "3", "3": "6", "6": "11", "11": "13"}


def test_readers_within_residual_blocks() -> None:
    torch.manual_seed(0)
    readers = find_readers(Residual().eval(), torch.randn(1, 3, 8, 8))
    assert readers == {"a": "b", "wide": "narrow", "deep": "narrow", "left": "both", "right": "both"}


def test_a_flattened_map_and_a_layer_that_runs_twice_have_no_single_reader() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.twice = nn.Conv2d(2, 4, 3), nn.Linear(64, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.twice(self.twice(self.fc(self.conv(x).relu().flatten(1)).relu()).relu())
            return y

    assert find_readers(Odd().eval(), torch.randn(2, 2, 6, 6)) == {}


@pytest.mark.slow
@settings(max_examples=6)
@given(shares=st.lists(st.floats(0.0, 0.95), min_size=4, max_size=4), batch=st.integers(1, 3))
def test_the_cost_of_a_plain_network_is_what_remains(shares: list[float], batch: int) -> None:
    model, x = plain(), torch.randn(batch, 4, 13, 13)
    inventory, cost = whole(plain, batch, 4, 13, 13)
    found = cut(model, inventory, dict(zip(["3", "6", "11", "13"], shares, strict=True)), "channel")
    assert remaining_macs(model, x) == pytest.approx(cost(found), rel=1e-9)


@pytest.mark.slow
@settings(max_examples=5)
@given(shares=st.lists(st.floats(0.0, 0.9), min_size=3, max_size=3))
def test_the_cost_of_inner_channels_is_what_remains(shares: list[float]) -> None:
    model, x = residual(), torch.randn(1, 3, 8, 8)
    inventory, cost = whole(residual, 1, 3, 8, 8)
    assert cost({}) == sum(layer.macs for layer in inventory.layers)
    found = cut(model, inventory, dict(zip(["b", "narrow", "both"], shares, strict=True)), "channel")
    assert remaining_macs(model, x) == pytest.approx(cost(found), rel=1e-9)


def test_channels_of_a_residual_stream_free_no_producer() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    inventory = take_inventory(model, x)
    found = cut(model, inventory, {"a": 0.5, "wide": 0.5}, "channel")
    assert remaining_macs(model, x) == MacsCost(inventory, find_readers(model, x))(found)


@pytest.mark.parametrize("pattern", ["unstructured", "group"])
def test_scattered_zeros_count_where_they_are(pattern: str) -> None:
    model, x = plain(), torch.randn(2, 4, 13, 13)
    inventory = take_inventory(model, x)
    found = cut(model, inventory, {"3": 0.5, "6": 0.25}, pattern)
    assert remaining_macs(model, x) == pytest.approx(MacsCost(inventory)(found), rel=1e-9)


@pytest.mark.parametrize("kept", [2, 3, 8])
def test_filters_nobody_reads_go_from_a_layer_that_reads_few_channels_itself(kept: int) -> None:
    """All filters of `a` share their zeros: they are no group that must stay whole."""
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model.a.weight[:, : 16 - kept] = 0.0  # the others read all of the stem, so that its channels stay
        model.b.weight[:, : 24 - kept] = 0.0
    before = remaining_macs(Residual().eval(), x)
    gone = 64 * 9 * (16 * 24 - kept * kept) + 64 * 9 * 16 * (24 - kept)
    assert remaining_macs(model, x) == before - gone
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(repack(model, x, threads=1)(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["filter", "channel"])
@pytest.mark.parametrize("method", ["one_shot", "sr_ste"])
def test_a_trained_network_really_loses_what_was_cut(pattern: str, method: str) -> None:
    task = digits(widths=(8, 16), blocks=1)
    model, (x,) = task.model, task.example_inputs(2)
    inventory = take_inventory(model, x)
    readers = find_readers(model.eval(), x)
    inner = [name for name in readers.values() if inventory[name].kind == "conv2d"]
    cut_at = inner if pattern == "channel" else [n for n, r in readers.items() if r in inner]
    assert len(cut_at) == 2  # a basic block has one inner map
    dense = remaining_macs(model, x)
    plan = Plan({name: LayerPlan(0.5, Choice(pattern)) for name in cut_at})
    pruner = Pruner(model, inventory, plan, task.calibration, task.loss)
    train_(
        model, task.train, task.loss, TrainingSettings(max_steps=20), seed=0, method=TRAINING.create(Choice(method)),
        pruner=pruner,
    )  # fmt: skip
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # shifts are there, or there would be nothing to remove
            assert module.bias.any()
    graph = simplify(capture(model, (x,)))
    widths = {
        op.attributes["layer"]: tuple(graph.constants[op.tensors["weight"]].shape[:2])
        for op in graph.ops
        if op.attributes.get("layer") is not None
    }
    assert find_readers(model, x) == readers
    for producer, reader in readers.items():
        if reader in inner:
            assert widths[producer][0] == widths[reader][1] == inventory[producer].weight_shape[0] // 2
    freed = sum(inventory[p].macs + inventory[r].macs for p, r in readers.items() if r in inner) // 2
    assert remaining_macs(model, x) == dense - freed
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(reference(graph, (x,)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(repack(model, x, form="program")(x), wanted, rtol=1e-4, atol=1e-5)
