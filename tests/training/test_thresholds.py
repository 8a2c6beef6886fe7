"""Trained thresholds: gradients, who shares a threshold, the budget's control, resume."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.patterns import PATTERNS
from autoprune.patterns.base import cell_means
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.training import Pruner, train_
from autoprune.training.gated import CellTable
from autoprune.training.thresholds import Gated, Thresholds, long_tailed

PATTERN_CHOICES = [
    Choice("unstructured"), Choice("group", {"size": 4}), Choice("group", {"size": 3}), Choice("channel"),
    Choice("filter"),
]  # fmt: skip
SHAPES = [((12, 3, 2, 2), 1), ((12, 3, 2, 2), 3), ((12, 5), 1)]


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient * long_tailed(ctx.saved_tensors[0])


def test_the_surrogate_is_the_papers() -> None:
    x = torch.tensor([0.0, 0.1, -0.3, 0.4, -0.7, 1.0, 1.01, -5.0])
    assert torch.allclose(long_tailed(x), torch.tensor([2.0, 1.6, 0.8, 0.4, 0.4, 0.4, 0.0, 0.0]))


@examples(max_examples=30)
@given(choice=st.sampled_from(PATTERN_CHOICES), shape=st.sampled_from(SHAPES), seed=st.integers(0, 99))
def test_value_and_gradients_are_those_of_an_explicit_forward(
    choice: Choice, shape: tuple[tuple[int, ...], int], seed: int
) -> None:
    torch.manual_seed(seed)
    cells = PATTERNS.create(choice).cells(*shape)
    table = CellTable.of(cells)
    weight = torch.randn(shape[0], requires_grad=True)
    threshold = (torch.rand(table.thresholds) * 1.5).requires_grad_()
    outside = torch.randn(shape[0])

    count = len(table.size)
    score = torch.zeros(count).index_add(0, cells.flatten(), weight.abs().flatten()) / table.size
    mean, size = cell_means(weight.abs(), cells)
    assert torch.allclose(score, mean.float(), atol=1e-6)
    assert torch.equal(table.size, size.float())
    scaled = score / score.detach().square().mean().sqrt()
    explicit = weight * Step.apply(scaled - threshold[table.owner])[cells]  # type: ignore[no-untyped-call]
    wanted = torch.autograd.grad((explicit * outside).sum(), [weight, threshold])
    gated = Gated.apply(weight, threshold, table)  # type: ignore[no-untyped-call]
    assert torch.allclose(gated, explicit)
    for got, want in zip(torch.autograd.grad((gated * outside).sum(), [weight, threshold]), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("choice", "conv_groups", "thresholds"),
    [
        (Choice("unstructured"), 1, 12), (Choice("group", {"size": 4}), 1, 3), (Choice("group", {"size": 5}), 1, 3),
        (Choice("group", {"size": 4}), 2, 4), (Choice("channel"), 1, 1), (Choice("filter"), 1, 1),
    ],
)  # fmt: skip
def test_filters_that_share_cells_share_a_threshold(choice: Choice, conv_groups: int, thresholds: int) -> None:
    cells = PATTERNS.create(choice).cells((12, 3, 2, 2), conv_groups)
    table = CellTable.of(cells)
    assert table.thresholds == thresholds
    owners = table.owner[cells].flatten(1)
    assert (owners == owners[:, :1]).all()  # a filter has one


def subject(value: float = 0.8) -> Pruner:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8))
    inventory = take_inventory(network, torch.zeros(1, 2, 6, 6))
    layers = {name: LayerPlan(value, Choice("group", {"size": 4})) for name in inventory.names}
    return Pruner(network, inventory, Plan(layers), [], nn.functional.cross_entropy)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 2, 6, 6, generator=generator)
    return [(one, one.flatten(1)[:, :8].argmax(1)) for one in x]


def train(pruner: Pruner, method: Thresholds, epochs: int) -> None:
    settings = TrainingSettings(epochs=epochs, learning_rate=0.05)
    train_(pruner.model, batches(), pruner.loss, settings, seed=0, method=method, pruner=pruner)


def test_the_penalty_is_the_papers_and_ends_with_the_freeze() -> None:
    method = Thresholds(end=0.5, freeze=0.5)
    method.start(subject(), 4)
    with torch.no_grad():
        for value in method.parameters.values():
            value.fill_(0.5)
    count = sum(len(value) for value in method.parameters.values())
    wanted = 1e-3 * count * torch.tensor(-0.5).exp()
    assert torch.isclose(method.pressure(), wanted)
    step_without_a_loss(method, 1)
    raised = {name: value.detach().clone() for name, value in method.parameters.items()}
    assert all(bool((value > 0.5).all()) for value in raised.values())
    method.update(2)
    step_without_a_loss(method, 3)
    assert all(torch.equal(value, raised[name]) for name, value in method.parameters.items())


def step_without_a_loss(method: Thresholds, step: int) -> None:
    for name in method.latent:
        weight = method.pruner.weight(name)
        weight.grad = torch.zeros_like(weight)
    method.before_step(step)
    method.after_step(step)


def test_alpha_follows_the_gap() -> None:
    method = Thresholds(end=0.5, freeze=0.9)
    method.start(subject(0.8), 100)
    method.update(40)  # nothing is cut yet, and nearly all should be
    behind = method.log_alpha
    assert behind > -6.9
    with torch.no_grad():
        for value in method.parameters.values():
            value.fill_(9.0)
    method.update(60)
    assert method.log_alpha < behind
    for name in method.latent:  # under 1% is left: set back to the planned share
        assert float(method._alive(name).float().mean()) == pytest.approx(0.2, abs=0.05)


def test_the_budget_is_near_before_the_freeze_and_met_at_it() -> None:
    pruner, method = subject(0.8), Thresholds(freeze=1.0)
    seen: list[float] = []
    real = method.update

    def update(step: int) -> None:
        real(step)
        if method.masks:
            cut = sum(int((~mask).sum()) for mask in method.masks.values())
            seen.append(cut / sum(mask.numel() for mask in method.masks.values()))

    method.update = update  # type: ignore[method-assign]
    train(pruner, method, 40)
    assert sum(seen[100:-1]) / len(seen[100:-1]) == pytest.approx(0.8, abs=0.1)
    assert seen[-1] == pytest.approx(0.8, abs=0.02)


def test_frozen_masks_stay() -> None:
    pruner, method = subject(), Thresholds(end=0.5, freeze=0.5)
    method.start(pruner, 4)
    method.update(2)
    before = {name: mask.clone() for name, mask in method.masks.items()}
    thresholds = {name: value.detach().clone() for name, value in method.parameters.items()}
    for step in (3, 4):
        for name in method.latent:
            pruner.weight(name).grad = torch.ones_like(pruner.weight(name))
        method.before_step(step)
        assert all(torch.equal(cast("Tensor", pruner.weight(name).grad), mask.float()) for name, mask in before.items())
        method.after_step(step)
    assert all(torch.equal(method.masks[name], mask) for name, mask in before.items())
    assert all(torch.equal(method.parameters[name], value) for name, value in thresholds.items())
    assert method.signals().scalars["alpha"] == 0.0


@pytest.mark.parametrize("killed", [3, 9])
def test_a_resumed_method_is_the_same_bit_for_bit(killed: int) -> None:
    def step(pruner: Pruner, method: Thresholds, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        x, y = batches()[number % 4]
        pruner.loss(pruner.model(x), y).backward()
        method.before_step(number)
        optimizer.step()
        method.after_step(number)

    def begin() -> tuple[Pruner, Thresholds, torch.optim.Optimizer]:
        pruner, method = subject(), Thresholds()
        method.start(pruner, 12)
        return pruner, method, torch.optim.SGD(pruner.model.parameters(), lr=0.05)

    first = begin()
    for number in range(1, killed + 1):
        step(*first, number)
    second = begin()
    second[0].model.load_state_dict(first[0].model.state_dict())
    second[1].load_state({name: value.clone() for name, value in first[1].state().items()})
    for number in range(killed + 1, 13):
        step(*first, number)
        step(*second, number)
    ends = [run[0].model.state_dict() for run in (first, second)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert all(torch.equal(value, second[1].state()[name]) for name, value in first[1].state().items())


def test_signals_show_thresholds_and_alpha() -> None:
    method = Thresholds()
    method.start(subject(), 100)
    method.update(1)
    signals = method.signals()
    assert {"alpha", "sparsity", "threshold/0", "threshold/4"} <= set(signals.scalars)
    assert signals.histograms["thresholds/0"].shape == (4,)
    assert sparsity(method.masks["0"]) == 0.0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.6}, "needs 0 <= begin < end <= 1"),
        ({"freeze": 0.1}, "freeze must be a number in [0.6, 1], not 0.1"),
        ({"speed": -1.0}, "speed must be a number >= 0, not -1.0"),
        ({"least": "1%"}, "least must be a number in [0, 0.5], not '1%'"),
    ],
)
def test_refuses(args: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Thresholds(**args)
    assert said in str(caught.value)
