"""Laws of every criterion: scores are non-negative, finite, in the weight's shape, and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.criteria import CRITERIA
from autoprune.inventory import take_inventory
from autoprune.masks import collect_statistics, weight_of
from autoprune.registry import Choice


def grouped_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(), nn.Linear(16 * 36, 10)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4, 8, 8), torch.randint(0, 10, (8,))) for _ in range(2)]


@pytest.mark.parametrize("name", list(CRITERIA))
def test_saliency_is_non_negative_and_repeatable(name: str) -> None:
    model = grouped_cnn()
    inventory = take_inventory(model, torch.zeros(1, 4, 8, 8))
    criterion = CRITERIA.create(Choice(name))
    scores = []
    for _ in range(2):
        statistics = collect_statistics(model, inventory.names, batches(), nn.functional.cross_entropy, criterion.needs)
        scores.append(
            [
                criterion.saliency(weight_of(model, layer.name), statistics[layer.name], layer.conv_groups)
                for layer in inventory.layers
            ]
        )
    for layer, first, second in zip(inventory.layers, *scores, strict=True):
        assert tuple(first.shape) == layer.weight_shape
        assert torch.isfinite(first).all()
        assert (first >= 0).all()
        assert torch.equal(first, second)


def test_activation_reads_the_norm_of_the_right_input_group() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False))
    nn.init.ones_(weight_of(model, "0"))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    statistics = collect_statistics(model, ["0"], [(x, torch.zeros(1))], lambda *_: torch.zeros(()), {"input_norm"})
    scores = CRITERIA.create(Choice("activation")).saliency(weight_of(model, "0"), statistics["0"], 2)
    assert scores.flatten(1).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_gradient_matches_a_finite_difference() -> None:
    model = nn.Linear(3, 1, bias=False)
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    wrapped = nn.Sequential(model)
    statistics = collect_statistics(wrapped, ["0"], [(x, y)], nn.functional.mse_loss, {"gradient"})
    expected = (2 * (x @ model.weight.T - y) * x).mean(0).abs()
    assert statistics["0"].gradient is not None
    torch.testing.assert_close(statistics["0"].gradient[0], expected.detach())


def test_statistics_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    collect_statistics(model, ["0"], batches(), nn.functional.cross_entropy, {"gradient", "input_norm"})
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
