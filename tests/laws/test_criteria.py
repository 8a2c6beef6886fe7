"""Laws of every criterion: scores are non-negative, finite, in the weight's shape, and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.criteria import CRITERIA
from autoprune.errors import ConfigError
from autoprune.masks import collect_statistics
from autoprune.model.weights import weight_of
from autoprune.registry import Choice
from autoprune.testing import check_criterion


def grouped_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(), nn.Linear(16 * 36, 10)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4, 8, 8), torch.randint(0, 10, (8,))) for _ in range(2)]


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_keeps_the_laws(name: str) -> None:
    check_criterion(CRITERIA.create(Choice(name)))


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


def test_fisher_is_the_mean_over_samples_of_the_squared_gradient() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True),  # in place: over the layer's own output
        nn.Conv2d(8, 8, (3, 1), groups=4, dilation=2), nn.Flatten(1, 2), nn.Linear(4, 6), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    names = ["0", "2", "4", "7"]
    data = [(torch.randn(n, 4, 16, 8), torch.randint(0, 10, (n,))) for n in (3, 2)]
    statistics = collect_statistics(model, names, data, nn.functional.cross_entropy, {"squared_gradient", "gradient"})
    for name in names:
        weight = weight_of(model, name)
        one_by_one = [
            torch.autograd.grad(nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), weight)[0]
            for x, y in data
            for i in range(len(x))
        ]
        expected = weight.detach() ** 2 * torch.stack(one_by_one).square().mean(0) / 2
        torch.testing.assert_close(CRITERIA.create(Choice("fisher")).saliency(weight, statistics[name]), expected)
        whole = sum(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weight)[0].abs() for x, y in data)
        torch.testing.assert_close(statistics[name].gradient, whole)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 2, groups=2, padding=1), nn.Linear(4, 6)])
def test_obs_is_the_error_left_when_the_row_makes_the_best_of_a_cut(layer: nn.Conv2d | nn.Linear) -> None:
    torch.manual_seed(3)
    conv = isinstance(layer, nn.Conv2d)
    x = torch.randn(9, 4, 5, 5) if conv else torch.randn(9, 7, 4)
    x += 0.5 * x.flip(1)  # correlated channels
    model, groups = nn.Sequential(layer), 2 if conv else 1
    statistics = collect_statistics(model, ["0"], [(x, torch.zeros(1))], lambda *_: torch.zeros(()), {"input_moments"})
    saliency = CRITERIA.create(Choice("obs", {"damping": 1e-9})).saliency(layer.weight, statistics["0"], groups)
    if conv:
        unfolded = nn.functional.unfold(x, 2, padding=1).transpose(0, 1).flatten(1)
        columns = list(unfolded.double().chunk(2))  # a group's input channels come first
    else:
        columns = [x.reshape(-1, 4).T.double()]
    rows = layer.weight.detach().double().flatten(1)
    for row, scores in zip(range(6), saliency.flatten(1).double(), strict=True):
        c = columns[row // (6 // groups)]
        for cut in range(c.shape[0]):
            others = torch.cat([c[:cut], c[cut + 1 :]])
            wanted = rows[row] @ c
            fit = torch.linalg.lstsq(others.T, wanted[:, None]).solution[:, 0]
            error = float((fit @ others - wanted).square().mean())
            assert float(scores[cut]) == pytest.approx(error, rel=1e-3)


def test_obs_survives_inputs_that_are_all_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.zeros(2, 4), torch.zeros(1))]
    statistics = collect_statistics(model, ["0"], data, lambda *_: torch.zeros(()), {"input_moments"})
    scores = CRITERIA.create(Choice("obs")).saliency(weight_of(model, "0"), statistics["0"])
    assert torch.isfinite(scores).all()


def test_obs_refuses() -> None:
    with pytest.raises(ConfigError, match="damping must be a number > 0, not 0"):
        CRITERIA.create(Choice("obs", {"damping": 0}))


def test_statistics_hold_what_was_asked_for_alone() -> None:
    every = {"gradient", "input_norm", "squared_gradient", "input_moments"}
    for wanted in every:
        loss = nn.functional.cross_entropy
        statistics = collect_statistics(grouped_cnn(), ["0", "2"], batches(), loss, {wanted})["2"]
        assert {name for name in every if getattr(statistics, name) is not None} == {wanted}
