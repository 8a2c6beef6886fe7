"""Joint structure search: its gradients against autograd, its thresholds, its pull to the budget, its end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from autoprune.allocation import MacsCost, WeightCost, make_allocation
from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.joint import STATISTICS, Joint

LOSS = functional.cross_entropy
PATTERN = Choice("group", {"size": 4})


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(),
        nn.Linear(64, 12),
    )  # fmt: skip


def subject(sparsities: tuple[float, ...] = (0.5, 0.6, 0.7), pattern: Choice = PATTERN, macs: bool = False) -> Pruner:
    network = model()
    inventory = take_inventory(network, torch.zeros(1, 4, 6, 6))
    layers = {name: LayerPlan(value, pattern) for name, value in zip(inventory.names, sparsities, strict=True)}
    return Pruner(network, inventory, Plan(layers), random_batches(1), LOSS, MacsCost(inventory) if macs else None)


def started(pruner: Pruner, steps: int, total: int = 40, **args: Any) -> Joint:
    """The method after `steps` steps of plain SGD."""
    torch.manual_seed(0)
    method = TRAINING.create(Choice("joint", args))
    assert isinstance(method, Joint)
    method.start(pruner, total)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        x, y = random_batches()[step % 4]
        optimizer.zero_grad()
        LOSS(pruner.model(x), y).backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
    return method


def cell_sums(values: Tensor, cells: Tensor) -> Tensor:
    return torch.zeros(int(cells.max()) + 1).index_add_(0, cells.flatten(), values.flatten())


@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("pattern", [PATTERN, Choice("channel"), Choice("unstructured")], ids=str)
def test_gradients_are_those_of_the_gated_model(generator: bool, pattern: Choice) -> None:
    """Against autograd through a forward pass that computes statistics -> thresholds -> gates -> weights itself."""
    pruner = subject(pattern=pattern)
    method = started(
        pruner, 6, begin=0.0, end=0.5, freeze=0.75, speed=5.0, generator=generator, strength=0.7, allocation="planned"
    )
    own = {name: value.detach().clone().requires_grad_() for name, value in method.parameters.items()}
    latent = {name: value.detach().clone().requires_grad_() for name, value in method.latent.items()}
    if generator:
        network = {name.removeprefix("network."): v for name, v in own.items() if name.startswith("network.")}
        offsets = functional_call(method.network, network, (method.statistics,))
    else:
        offsets = own["offsets"]
    heat = 0.1 ** (6 / 30)
    effective, kept = {}, {}
    for index, name in enumerate(latent):
        spec = pruner.inventory[name]
        cells = PATTERNS.create(pattern).cells(spec.weight_shape, spec.conv_groups)
        score = own[f"score.{name}"] + method.norms[name] - method.first_norms[name]
        threshold = method.anchors[index] + method.spreads[index] * offsets[index]
        soft = ((score - threshold) / (heat * method.spreads[index])).sigmoid()
        hard = (soft > 0.5).float()
        assert 0 < int(hard.sum()) < len(hard)
        effective[f"{name}.weight"] = latent[name] * (hard + soft - soft.detach())[cells]
        kept[name] = (cell_sums(torch.ones(cells.shape), cells) * (hard + soft - soft.detach())).sum()
    whole = {**dict(pruner.model.named_parameters()), **effective}
    x, y = random_batches()[3]
    left = torch.stack(list(kept.values())).sum()
    gap = (left - method.budget) / method.budget  # every layer is pruned, and the cost counts weights
    pull = 0.7 * torch.where(gap.abs() < 0.1, 5 * gap**2, gap.abs() - 0.05)
    value = LOSS(functional_call(copy.deepcopy(pruner.model), whole, (x,)), y) + pull
    value.backward()

    pruner.model.zero_grad()
    LOSS(pruner.model(x), y).backward()
    method.own = torch.optim.SGD(method.parameters.values(), lr=0.0)  # so that only gradients change
    method.before_step(7)
    assert method.gap == pytest.approx(gap.item(), abs=1e-5)
    for name in method.parameters:
        torch.testing.assert_close(method.parameters[name].grad, own[name].grad, rtol=1e-3, atol=1e-5)
    for name, leaf in latent.items():
        torch.testing.assert_close(pruner.weight(name).grad, leaf.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("macs", [False, True])
def test_thresholds_start_as_the_allocations(macs: bool) -> None:
    pruner = subject(pattern=Choice("unstructured"), macs=macs)
    method = started(pruner, 0, begin=0.0, end=0.5, allocation="lamp")
    method._refresh(20)
    method._look(20)
    lamp = pruner.masks(allocation=make_allocation("lamp"))  # by magnitude, as the plan's criterion
    assert {name: sparsity(mask) for name, mask in lamp.items()} != pytest.approx({"0": 0.5, "3": 0.6, "5": 0.7}, 0.02)
    for name, mask in method.masks.items():
        assert sparsity(mask) == pytest.approx(sparsity(lamp[name]), abs=2 / mask.numel())
    cost = pruner.cost or WeightCost(pruner.inventory)
    assert method.budget == cost({name: layer.sparsity for name, layer in pruner.layers.items()})


def test_scores_start_as_norms_and_thresholds_as_the_plans() -> None:
    pruner = subject(pattern=Choice("filter"))
    method = started(pruner, 0, begin=0.0, end=0.5, allocation="planned")
    norm = pruner.weight("0").detach().flatten(1).square().mean(1).sqrt()
    wanted = (norm - norm.mean()) / norm.std(correction=0)
    torch.testing.assert_close(method.score("0").detach(), wanted)
    assert method.statistics.shape == (3, STATISTICS)
    assert all(mask.all() for mask in method.masks.values())  # the plan's fraction is 0 still
    method._refresh(20)
    method._look(20)
    assert {name: sparsity(mask) for name, mask in method.masks.items()} == pytest.approx(
        {"0": 0.5, "3": 10 / 16, "5": 8 / 12}  # whole filters
    )


@pytest.mark.parametrize("macs", [False, True])
def test_the_cost_changes_by_its_slopes(macs: bool) -> None:
    pruner = subject(macs=macs)
    method = started(pruner, 5)
    cost = pruner.cost or WeightCost(pruner.inventory)
    shares = {name: sparsity(mask) for name, mask in method.masks.items()}
    per_layer = [layer.macs if macs else layer.weights for layer in pruner.inventory.layers]
    torch.testing.assert_close(method.slopes, -torch.tensor(per_layer, dtype=torch.float32), rtol=1e-3, atol=1e-2)
    method.pressure()
    assert method.gap == pytest.approx((cost(shares) - method.budget) / method.budget, abs=1e-5)


@pytest.mark.parametrize("offset", [-1.0, 1.0])
@pytest.mark.parametrize("generator", [True, False])
def test_the_gap_alone_closes_itself(generator: bool, offset: float) -> None:
    pruner = subject(pattern=Choice("unstructured"))
    method = started(pruner, 0, total=200, begin=0.0, end=0.01, freeze=1.0, speed=5.0, generator=generator, follow=0.0)
    with torch.no_grad():
        method.parameters["network.out.bias" if generator else "offsets"].fill_(offset)
    gaps = []
    for step in range(1, 150):  # no gradient, and nothing moves the weights
        method.before_step(step)
        method.after_step(step)
        gaps.append(method.gap)
    assert min(map(abs, gaps[2:5])) > 0.3
    assert (gaps[4] > 0) == (offset < 0)
    assert abs(gaps[-1]) < 0.05


def test_the_end_is_frozen_and_on_the_budget() -> None:
    pruner = subject()
    method = started(pruner, 30, freeze=0.75)
    assert method.frozen
    assert method.signals().histograms == {}
    masks = {name: mask.clone() for name, mask in method.masks.items()}
    own = {name: value.detach().clone() for name, value in method.parameters.items()}
    ranked = [
        (
            float(method.logits[name].detach()[cells][mask].min()),
            float(method.logits[name].detach()[cells][~mask].max()),
        )
        for name, mask in masks.items()
        if (cells := method.tables[name].cells) is not None
    ]
    assert min(low for low, _ in ranked) >= max(high for _, high in ranked)  # one line through all layers
    cost = WeightCost(pruner.inventory)
    budget = cost({name: layer.sparsity for name, layer in pruner.layers.items()})
    assert budget - 40 < cost({name: sparsity(mask) for name, mask in masks.items()}) <= budget + 1
    method.before_step(31)
    method.after_step(31)
    assert all(torch.equal(method.masks[name], mask) for name, mask in masks.items())
    assert all(torch.equal(method.parameters[name].detach(), value) for name, value in own.items())


@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("steps", [0, 7, 35])
def test_its_state_is_all_it_needs(generator: bool, steps: int) -> None:
    first = subject()
    method = started(first, steps, generator=generator, follow=0.5)
    second = subject()
    second.model.load_state_dict(first.model.state_dict())
    again = TRAINING.create(Choice("joint", {"generator": generator, "follow": 0.5}))
    again.start(second, 40)
    again.load_state({name: value.clone() for name, value in method.state().items()})
    for name, value in method.state().items():
        assert torch.equal(value, again.state()[name]), name
    ends = []
    for pruner, each in ((first, method), (second, again)):
        x, y = random_batches()[2]
        pruner.model.zero_grad()
        LOSS(pruner.model(x), y).backward()
        each.before_step(steps + 1)
        each.after_step(steps + 1)
        ends.append(each.state() | {f"model.{k}": v for k, v in pruner.model.state_dict().items()})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_layers_that_the_loss_needs_keep_more() -> None:
    """A layer of noise and one that decides: the first pays for the second, by the thresholds."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x[:, :4].sum(1) > 0).long() + 2 * (x[:, 4:8].sum(1) > 0).long()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.useful, self.idle = nn.Linear(16, 32), nn.Linear(16, 32)
            self.out = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.out(self.useful(x).relu() + 0.01 * self.idle(x).relu())
            return logits

    network = Two()
    inventory = take_inventory(network, x[:1], keep_dense=("out",))
    plan = Plan(dict.fromkeys(inventory.names, LayerPlan(0.8, Choice("unstructured"))))
    pruner = Pruner(network, inventory, plan, [], LOSS)
    settings = TrainingSettings(epochs=30, learning_rate=0.1, weight_decay=0.0)
    method = TRAINING.create(Choice("joint"))
    result = train_(network, [(a, b) for a, b in zip(x.split(32), y.split(32), strict=True)], LOSS, settings, seed=0,
                    method=method, pruner=pruner)  # fmt: skip
    assert result.masks is not None
    assert sparsity(result.masks["useful"]) < 0.75 < 0.85 < sparsity(result.masks["idle"])


def test_signals() -> None:
    method = started(subject(), 5)
    signals = method.signals()
    assert {"threshold/0", "threshold/3", "threshold/5", "budget_gap", "sparsity/0", "regrowth"} <= set(signals.scalars)
    assert set(signals.histograms) == {"gates/0", "gates/3", "gates/5"}
    assert all(0 <= float(v.min()) <= float(v.max()) <= 1 for v in signals.histograms.values())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"end": 0.9}, "freeze must be a number in [0.9, 1], not 0.85"),
        ({"begin": 0.7}, "needs 0 <= begin < end <= 1, not begin=0.7, end=0.7"),
        ({"generator": 1}, "generator must be true or false, not 1"),
        ({"follow": 2}, "follow must be a number in [0, 1], not 2"),
        ({"temperature": 0}, "temperature must be a number >= 0.001, not 0"),
        ({"speed": -1}, "speed must be a number >= 0, not -1"),
        ({"allocation": "lamb"}, "Did you mean 'lamp'"),
        ({"threshold": 1}, "has no argument 'threshold'"),
    ],
)
def test_refuses(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice("joint", args))
    assert said in str(caught.value)
