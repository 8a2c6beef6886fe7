"""Weights are found by what multiplies by them, and pruned as their operator reads them."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autoprune
from autoprune.criteria import CRITERIA
from autoprune.latency.timer import Protocol
from autoprune.masks import apply_masks_, collect_statistics, make_masks, sparsity
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.model.uses import Use, watch_weights
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.repack import ProgramModel
from autoprune.repack.tuning.layer_times import layer_times

GROUPS = Choice("group", {"size": 4})
EVERY = {"gradient", "input_norm", "squared_gradient", "input_moments"}


class Turned(nn.Module):
    """A Linear whose weight is ``(in, out)``, as GPT-2's."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(wide, out) / wide**0.5), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.reshape(*x.shape[:-1], -1)


class Straight(nn.Module):
    """The same two layers as `mlp`, of torch's own Linears."""

    def __init__(self, first: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = first(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)).mean(1))
        return y


def twins() -> tuple[nn.Module, nn.Module]:
    """Two models that compute the same: the first holds a weight the other way round."""
    torch.manual_seed(0)
    turned, straight = Straight(Turned), Straight(nn.Linear)
    state = turned.state_dict()
    straight.load_state_dict({**state, "first.weight": state["first.weight"].t()})
    return turned, straight


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 7, 16), torch.randint(0, 5, (6,))) for _ in range(2)]


def statistics_of(model: nn.Module, names: list[str]) -> Any:
    return collect_statistics(model, names, batches(), functional.cross_entropy, EVERY)


def pruned(model: nn.Module, inventory: Inventory, plan: Plan) -> nn.Module:
    known = collect_statistics(model, plan.layers, [], functional.cross_entropy, [])
    masked = copy.deepcopy(model)
    return apply_masks_(masked, make_masks(masked, inventory, plan, known), inventory)


def plan_of(inventory: Inventory, share: float = 0.75, pattern: Choice = GROUPS) -> Plan:
    return Plan({name: LayerPlan(share, pattern) for name in inventory.names})


def test_a_turned_weight_has_the_statistics_of_its_twin() -> None:
    turned, straight = (statistics_of(model, ["first"])["first"] for model in twins())
    for name in ("input_norm", "input_moments"):
        torch.testing.assert_close(getattr(turned, name), getattr(straight, name))
    torch.testing.assert_close(turned.gradient, straight.gradient)
    torch.testing.assert_close(turned.squared_gradient, straight.squared_gradient)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_turned_weight_is_cut_as_its_twin(pattern: str) -> None:
    masks = []
    for model in twins():
        inventory = take_inventory(model, torch.randn(2, 7, 16))
        assert inventory["first"].weight_shape == (24, 16)
        plan = Plan({"first": LayerPlan(0.5, Choice(pattern))})
        masks.append(make_masks(model, inventory, plan, statistics_of(model, ["first"]))["first"])
    assert torch.equal(masks[0], masks[1].t())


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])  # that draws in order
def test_every_criterion_scores_a_turned_weight_as_its_twin(criterion: str) -> None:
    masks = []
    for model in twins():
        inventory = take_inventory(model, torch.randn(2, 7, 16))
        plan = Plan({"first": LayerPlan(0.5, GROUPS, Choice(criterion))})
        masks.append(make_masks(model, inventory, plan, statistics_of(model, ["first"]))["first"])
    assert torch.equal(masks[0], masks[1].t())


def test_a_silent_filter_of_a_turned_weight_loses_its_bias() -> None:
    model, _ = twins()
    inventory = take_inventory(model, torch.randn(2, 7, 16))
    masked = pruned(model, inventory, Plan({"first": LayerPlan(0.5, Choice("filter"))}))
    silent = ~weight_of(masked, "first").any(dim=0)
    assert int(silent.sum()) == 12
    assert torch.equal(cast("Tensor", masked.get_parameter("first.bias")) == 0, silent)


class Many(nn.Module):
    """Weights of every sort that no Conv2d or Linear multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(40, 32), nn.Parameter(torch.randn(1, 12, 32))
        self.turned, self.raw = Turned(32, 64), nn.Parameter(torch.randn(32, 64) / 8)
        self.right = nn.Parameter(torch.randn(64, 32) / 8)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.behind, self.scaled = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32) / 6)
        self.standard = nn.Parameter(torch.randn(32, 32))
        self.experts = nn.Parameter(torch.randn(3, 32, 32) / 6)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        y = torch.relu(self.turned(x))
        x = x + functional.linear(y, self.raw) + y @ self.right
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = functional.linear(x, self.behind.weight, self.behind.bias)
        x = x + functional.linear(x, self.scaled * 0.5) + functional.linear(x, self.experts[1])
        weight = (self.standard - self.standard.mean(1, keepdim=True)) / self.standard.std(1, keepdim=True)
        z: Tensor = self.head(x + functional.linear(x, weight))
        return z


def many() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Many().eval(), torch.randint(0, 40, (2, 12))


def test_every_weight_is_a_layer_or_has_its_reason() -> None:
    model, x = many()
    inventory = take_inventory(model, x)
    own = ["turned", "raw", "right", "attend.in_proj_weight", "attend.out_proj", "behind", "scaled", "embed"]
    assert inventory.names == own
    assert [layer.name for layer in inventory.layers if layer.turned] == ["turned", "right"]
    assert {layer.kind for layer in inventory.layers} == {"linear"}
    assert inventory["attend.in_proj_weight"].biases == ("attend.in_proj_bias",)
    assert inventory["behind"].biases == ("behind.bias",)
    reasons = {row.name: row.reason for row in inventory.dense}
    assert reasons.keys() == {"place", "standard", "experts", "head"}
    assert "add" in reasons["place"]
    assert "mean, sub, std" in reasons["standard"]
    assert "linear of a part" in reasons["experts"]
    assert "that of embed" in reasons["head"]


def test_every_planned_weight_is_packed_and_the_model_computes_the_same() -> None:
    model, x = many()
    inventory = take_inventory(model, x)
    masked = pruned(model, inventory, plan_of(inventory))
    assert all(sparsity(weight_of(masked, name)) == pytest.approx(0.75) for name in inventory.names)
    fast = autoprune.repack(masked, x)
    assert isinstance(fast, ProgramModel)
    rows = {row.name: row for row in fast.report}
    assert rows.keys() >= set(inventory.names)
    for name in inventory.names:
        assert (rows[name].kind, rows[name].backend) == ("linear", "jit")
        assert rows[name].sparsity == pytest.approx(0.75)
    torch.testing.assert_close(fast(x), masked(x), rtol=1e-4, atol=1e-4)
    times = {row.name: row for row in layer_times(fast, masked, x, Protocol(samples=1, warmup=1))}
    assert all(times[name].dense_us is not None for name in inventory.names)


def test_layers_of_their_own_say_what_multiplies_by_the_rest() -> None:
    model, x = many()
    inventory = take_inventory(model, x)
    masked = pruned(model, inventory, plan_of(inventory))
    fast = autoprune.repack(masked, x, form="modules")
    rows = {row.name: row for row in fast.report}
    for name in ("turned", "raw", "right", "attend.in_proj_weight", "scaled"):
        assert rows[name].backend == "dense"
        assert rows[name].sparsity == pytest.approx(0.75)
        assert "only a program" in rows[name].why
    torch.testing.assert_close(fast(x), masked(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attentions_samples_are_told_from_its_steps(batch_first: bool) -> None:
    torch.manual_seed(2)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 8)
    seen: dict[str, Use] = {}
    with watch_weights(attention, None, lambda name, use: seen.update({name: use})):
        attention(*[x if batch_first else x.transpose(0, 1)] * 3)
    assert seen.keys() == {"in_proj_weight", "out_proj"}
    use = seen["in_proj_weight"]
    assert torch.equal(use.by_sample(use.x, 3), x)
    assert seen["out_proj"].by_sample(seen["out_proj"].x, 3).shape == x.shape


def test_what_divides_is_not_pruned() -> None:
    """Its zeros would become infinite."""

    class Dividing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.over, self.under = nn.Parameter(torch.rand(24, 16) + 1), nn.Parameter(torch.rand(24, 24) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(functional.linear(x, self.over / 2), 1 / self.under)

    found = take_inventory(Dividing(), (torch.randn(2, 16),))
    assert found.names == ["over"]


def test_a_scaled_weight_is_forgotten_with_the_forward() -> None:
    """The memory of a product that is gone is another tensor's next."""
    weight = nn.Parameter(torch.randn(16, 16))
    model = nn.ParameterDict({"w": weight})
    names: list[str] = []
    with watch_weights(model, None, lambda name, _: names.append(name)):
        functional.linear(torch.ones(1, 16), weight * 2.0)
        for _ in range(20):
            functional.linear(torch.ones(1, 16), torch.randn(16, 16))
    assert names == ["w"]


def test_a_hooked_attention_trains_within_its_masks() -> None:
    torch.manual_seed(3)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(4, 6, 16)
    hooks = autoprune.PruningHooks(model, x, "gradual", sparsity=0.5, pattern=GROUPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks.start(optimizer, total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        hooks.after_step()
    masks = hooks.finish()
    assert {"self_attn.in_proj_weight", "self_attn.out_proj"} <= masks.keys()
    for name, mask in masks.items():
        assert not weight_of(model, name)[~mask].any()
        assert sparsity(mask) == pytest.approx(0.5)


class Flat(nn.Module):
    """Convolutions over one axis, of every sort of settings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 16, 5, stride=2, padding=2)
        self.dilated = nn.Conv1d(16, 16, 3, padding="same", dilation=2, bias=False)
        self.grouped = nn.Conv1d(16, 24, 3, groups=2)
        self.volume = nn.Conv3d(1, 8, 3, padding=1)
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dilated(torch.relu(self.first(x)))
        y = y + self.volume(y[:, None, None]).mean((1, 2))
        z: Tensor = self.last(torch.relu(self.grouped(y)).mean(2))
        return z


def test_convolutions_over_one_axis_are_layers_and_packed() -> None:
    torch.manual_seed(4)
    model, x = Flat().eval(), torch.randn(2, 8, 40)
    inventory = take_inventory(model, x)
    assert inventory.names == ["first", "dilated", "grouped", "last"]
    first = inventory["first"]
    assert (first.kind, first.weight_shape, first.positions) == ("conv1d", (16, 8, 5), 2 * 20)
    assert (first.stride, first.padding, first.dilation) == ((1, 2), (0, 2), (1, 1))
    assert (inventory["dilated"].padding, inventory["grouped"].conv_groups) == ((0, 2), 2)
    assert {row.name: row.reason for row in inventory.dense} == {
        "volume": "weights of its kind are not planned; a program packs a conv3d that has zeros"
    }
    masked = pruned(model, inventory, plan_of(inventory))
    fast = autoprune.repack(masked, x)
    rows = {row.name: row for row in fast.report}
    for name in inventory.names:
        assert rows[name].backend == "jit"
    for other in (x, torch.randn(3, 8, 40), torch.randn(1, 8, 57)):
        torch.testing.assert_close(fast(other), masked(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"padding": "same"}])
def test_a_conv1d_has_the_statistics_of_a_conv2d_of_height_1(settings: dict[str, Any]) -> None:
    torch.manual_seed(5)
    flat, tall = nn.Conv1d(8, 12, 3, **settings), nn.Conv2d(8, 12, (1, 3), **settings)
    if "stride" in settings:  # torch has them for both axes
        tall.stride, tall.padding = (1, settings["stride"]), (0, settings["padding"])
    tall.weight.data, tall.bias = flat.weight.data.unsqueeze(2), flat.bias
    x = torch.randn(4, 8, 16)
    found = []
    for layer, given in ((flat, x), (tall, x.unsqueeze(2))):
        model = nn.Sequential(layer, nn.Flatten())
        target = torch.zeros(4, dtype=torch.int64)
        found.append(collect_statistics(model, ["0"], [(given, target)], functional.cross_entropy, EVERY)["0"])
    for name in EVERY:
        one, other = (getattr(each, name) for each in found)
        torch.testing.assert_close(one.reshape(other.shape), other)
