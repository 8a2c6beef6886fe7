"""Expand: the budget of a wider model, the mixture's precisions, annealed gates, resume, a whole run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from autoprune.allocation import MacsCost, WeightCost
from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.expand import COLD, HOT, Expand
from autoprune.training.gradual import Gradual
from autoprune.training.widening import make_pruner_

LOSS = nn.functional.cross_entropy
X = torch.zeros(1, 3, 8, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 6),
    )  # fmt: skip


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    return random_batches(count, shape=(3, 8, 8), classes=6)


def subject(method: Expand | Gradual, value: float = 0.8, pattern: str = "unstructured") -> Pruner:
    network = model()
    inventory = take_inventory(network, X)
    plan = Plan({name: LayerPlan(value, Choice(pattern)) for name in inventory.names})
    return make_pruner_(method, network, inventory, plan, X, batches(1), LOSS)


@pytest.mark.parametrize("cost", [WeightCost, MacsCost])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_the_budget_stays_the_original_networks(cost: type[WeightCost] | type[MacsCost], factor: float) -> None:
    network, method = model(), Expand(factor=factor)
    before = take_inventory(network, X)
    sparsities = {"0": 0.0, "3": 0.7, "6": 0.9}
    plan = Plan({name: LayerPlan(value, Choice("unstructured")) for name, value in sparsities.items()})
    pruner = make_pruner_(method, network, before, plan, X, batches(1), LOSS, cost)
    assert pruner.model is network
    assert len(pruner.weight("0")) == 8 * factor
    assert isinstance(pruner.cost, cost)
    after = {name: layer.sparsity for name, layer in pruner.plan.layers.items()}
    assert pruner.cost(after) == pytest.approx(cost(before)(sparsities))
    result = train_(network, batches(), LOSS, TrainingSettings(epochs=2), seed=0, method=method, pruner=pruner)
    assert result.masks is not None
    ends = {name: sparsity(mask) for name, mask in result.masks.items()}
    cells = sum(layer.positions for layer in pruner.inventory.layers)
    assert 0 <= pruner.cost(after) - pruner.cost(ends) + 1e-6 <= cells + 1e-6


def test_a_layer_the_plan_leaves_out_keeps_its_shape() -> None:
    network = model()
    inventory = take_inventory(network, X)
    plan = Plan({name: LayerPlan(0.5, Choice("unstructured")) for name in ("3", "6")})
    pruner = make_pruner_(Expand(factor=2.0), network, inventory, plan, X, batches(1), LOSS)
    assert [tuple(layer.weight_shape) for layer in pruner.inventory.layers] == [(8, 3, 3, 3), (32, 8, 3, 3), (6, 512)]
    assert "0" not in pruner.plan.layers


def test_other_methods_widen_nothing() -> None:
    pruner = subject(Gradual())
    assert pruner.plan.layers["0"].sparsity == 0.8
    assert len(pruner.weight("0")) == 8


def test_a_model_that_cannot_be_widened_is_refused_before_training() -> None:
    network = nn.Sequential(nn.Linear(16, 16))
    inventory = take_inventory(network, torch.zeros(1, 16))
    plan = Plan({"0": LayerPlan(0.5, Choice("unstructured"))})
    with pytest.raises(AutopruneError, match="nothing in this model can be widened"):
        make_pruner_(Expand(), network, inventory, plan, torch.zeros(1, 16), [], LOSS)


def test_precision_is_the_posterior_mean_of_the_mixture() -> None:
    method = Expand(factor=1.0, floor=0.1)
    pruner = subject(method, pattern="filter")
    method.start(pruner, 10)
    weight = pruner.weight("3").detach()
    energy = weight.square().mean(dim=(1, 2, 3)) / weight.square().mean()
    n = weight[0].numel()
    # inverse-gamma(0, n floor / 2): the posterior is inverse-gamma(n / 2, (n energy + n floor) / 2)
    posterior = torch.distributions.Gamma(torch.tensor(n / 2), (n * energy + n * 0.1) / 2)  # of 1 / s^2
    torch.testing.assert_close(method.precision["3"][:, 0, 0, 0], posterior.mean * 1.1)


def test_the_penalty_pulls_weak_cells_harder() -> None:
    method = Expand(factor=1.0, strength=0.5)
    pruner = subject(method)
    method.start(pruner, 10)
    latent, zero = method.latent["3"], torch.zeros_like(method.latent["3"])
    pulled = method.pull_back("3", latent, zero)
    torch.testing.assert_close(pulled, 0.5 * method.precision["3"] * latent)
    relative = (pulled / latent).flatten()
    order = latent.abs().flatten().argsort()
    assert (relative[order].diff() <= 1e-6).all()


def test_weights_learn_through_their_gates() -> None:
    method = Expand(factor=1.0, strength=0.0, end=0.8, updates=10)
    pruner = subject(method)
    method.start(pruner, 20)
    method.before_step(1)
    method.after_step(2)  # the first gates
    latent, gate = method.latent["3"].clone().requires_grad_(), method.gates["3"]
    loss = (latent * gate).square().sum()
    (wanted,) = torch.autograd.grad(loss, latent)
    given = 2.0 * pruner.weight("3").detach()  # the same loss, by the weight the model computes with
    torch.testing.assert_close(method.pull_back("3", method.latent["3"], given), wanted)
    assert bool((gate < 0.2).any())


def test_gates_are_annealed_from_soft_to_hard_then_frozen() -> None:
    method = Expand(factor=1.0, end=0.5, updates=10)
    pruner = subject(method, 0.7)
    method.start(pruner, 40)
    assert method.temperature(0) == HOT
    assert method.temperature(20) == pytest.approx(COLD)
    undecided = []
    for step in range(1, 41):
        method.before_step(step)
        method.after_step(step)
        if 2 <= step < 20 and step % 2 == 0:
            gate = method.gates["6"]
            undecided.append(float(((gate > 0.1) & (gate < 0.9)).float().mean()))
            torch.testing.assert_close(pruner.weight("6"), method.latent["6"] * gate)
        if step == 20:
            final = {name: mask.clone() for name, mask in method.masks.items()}
    assert undecided[-1] < 0.05 < undecided[0]
    assert not method.gates
    assert all(torch.equal(mask, final[name]) for name, mask in method.masks.items())
    cut = sum(int((~mask).sum()) for mask in final.values())
    assert cut == pytest.approx(0.7 * sum(mask.numel() for mask in final.values()), abs=1)


@pytest.mark.parametrize("stop", [1, 7, 12, 15])
def test_a_resumed_run_ends_bit_for_bit_alike(stop: int) -> None:
    def make() -> tuple[Expand, Pruner]:
        method = Expand(factor=1.5, updates=7)
        return method, subject(method)

    def go(method: Expand, pruner: Pruner, steps: range) -> None:
        for step in steps:
            for name in pruner.inventory.names:
                weight = pruner.weight(name)
                weight.grad = torch.sin(37.0 * weight.detach() + step)
            method.before_step(step)
            with torch.no_grad():
                for name in pruner.inventory.names:
                    weight = pruner.weight(name)
                    weight -= 0.02 * weight.grad  # type: ignore[operator]
            method.after_step(step)

    whole, first = make()
    whole.start(first, 20)
    go(whole, first, range(1, stop + 1))
    saved, weights = copy.deepcopy(whole.state()), copy.deepcopy(first.model.state_dict())
    go(whole, first, range(stop + 1, 21))
    again, second = make()
    again.start(second, 20)
    second.model.load_state_dict(weights)
    again.load_state(saved)
    go(again, second, range(stop + 1, 21))
    ends = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"factor": 0.5}, "factor must be a number in [1, 16], not 0.5"),
        ({"end": 0.0}, "end must be a number in (0, 1], not 0.0"),
        ({"strength": -1.0}, "strength must be a number >= 0, not -1.0"),
        ({"floor": 0}, "floor must be a number > 0, not 0"),
        ({"floor": math.nan}, "floor must be a number > 0, not nan"),
        ({"updates": True}, "updates must be an integer >= 1, not True"),
        ({"widen": 2}, "has no argument 'widen'"),
    ],
)
def test_bad_arguments_are_refused(args: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice("expand", args))
    assert said in str(caught.value)
