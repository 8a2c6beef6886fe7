"""Affine compensation: cut channels that follow from the others and a constant cost nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autoprune.criteria import LayerStatistics
from autoprune.errors import ConfigError
from autoprune.evaluation.recovery import RECOVERIES, Subject
from autoprune.evaluation.recovery.reconstruct import reconstruct_
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.testing import check_recovery

X = (torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)


class Recurrent(nn.Module):
    """An LSTM, and a Linear behind it, over a batch of maps read as sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(18, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.head(self.rnn(x.reshape(len(x), 6, 18))[0])
        return last


def network(kind: str) -> nn.Sequential:
    """Channels 4 to 7 of the first layer are affine functions of the others; small, so that they are cut first."""
    torch.manual_seed(0)
    conv = kind != "linear"
    first: nn.Conv2d | nn.Linear = nn.Conv2d(3, 8, 3) if conv else nn.Linear(108, 8)
    second: nn.Conv2d | nn.Linear = nn.Conv2d(8, 6, 2, bias=kind != "norm behind") if conv else nn.Linear(8, 6)
    nn.init.normal_(first.weight)
    mixed = 0.05 * torch.randn(4, 4)
    with torch.no_grad():
        first.weight[4:] = (mixed @ first.weight[:4].flatten(1)).reshape(first.weight[4:].shape)
        second.weight[:, 4:] *= 0.1
    parts: list[nn.Module] = [] if conv else [nn.Flatten()]
    parts.append(first)
    if kind == "norm between":
        parts.append(nn.BatchNorm2d(8))
    parts.append(second)
    if kind == "norm behind":
        parts.append(nn.BatchNorm2d(6))
    model = nn.Sequential(*parts)
    model.train()(X[0])  # the norms have seen the data
    for norm in (part for part in parts if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
        norm.momentum = None
        norm.reset_running_stats()
        norm(model[: parts.index(norm)](X[0]))
    return model.eval()


def subject(dense: nn.Module) -> Subject:
    inventory = take_inventory(dense, X[0][:1], min_weights=1)
    data = [(X[0], torch.zeros(len(X[0]), dtype=torch.long))]
    task = Task("test", dense, data, tuple(data), data, data, nn.functional.cross_entropy, None)
    return Subject(task, dense, inventory, dict.fromkeys(inventory.names, LayerStatistics()), TrainingSettings(), 0)


def gap(model: nn.Module, dense: nn.Module) -> float:
    """Mean square of the outputs' difference over that of the dense output's spread."""
    with torch.no_grad():
        wanted = dense(X[0])
        return float((model.eval()(X[0]) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("kind", ["linear", "conv", "norm between", "norm behind"])
@pytest.mark.parametrize("cut", ["filter", "channel"])
def test_what_follows_from_the_kept_channels_is_made_up_for(cut: str, kind: str) -> None:
    """Filters of the first layer, whose reader is not cut; or the channels that the reader reads."""
    dense = network(kind)
    given = subject(dense)
    name = given.inventory.names[0 if cut == "filter" else 1]
    plan, gaps = Plan({name: LayerPlan(0.5, Choice(cut))}), {}
    for affine in (False, True):
        model = copy.deepcopy(dense)
        RECOVERIES.create(Choice("reconstruct", {"damping": 1e-9, "affine": affine})).recover_(model, plan, given)
        gaps[affine] = gap(model, dense)
        mask = given.masks(plan)[name]
        assert not weight_of(model, name)[~mask].any()
        bias = model.get_parameter(f"{given.inventory.names[0]}.bias")
        assert cut == "channel" or not bias[4:].any(), "a filter cut as a whole is silent"
    assert gaps[True] < 1e-5
    assert gaps[False] > 10 * gaps[True]


def test_weights_and_constant_are_least_squares() -> None:
    dense = nn.Sequential(nn.Linear(108, 6))
    model, x = copy.deepcopy(dense), X[0].flatten(1) + 1.0
    mask = torch.rand(6, 108, generator=torch.Generator().manual_seed(2)) < 0.2
    weight_of(model, "0").data *= mask
    batches = [(part, torch.zeros(len(part))) for part in x.split(20)]
    added = reconstruct_(model, dense, "0", mask, batches, damping=1e-12, constant=True)
    with torch.no_grad():
        wanted = (dense(x) - dense[0].bias).double()
    for row in range(6):
        read = torch.cat([x[:, mask[row]], torch.ones(len(x), 1)], dim=1).double()
        best = torch.linalg.lstsq(read, wanted[:, row]).solution
        torch.testing.assert_close(
            weight_of(model, "0")[row][mask[row]].detach().double(), best[:-1], atol=1e-4, rtol=1e-3
        )
        assert float(added[row]) == pytest.approx(float(best[-1]), abs=1e-3)


def test_without_a_constant_nothing_is_to_be_added() -> None:
    dense = network("conv")
    model = copy.deepcopy(dense)
    mask = torch.ones_like(weight_of(model, "1"), dtype=torch.bool)
    assert not reconstruct_(model, dense, "1", mask, subject(dense).task.calibration).any()


def test_a_recurrent_network_comes_nearer_too() -> None:
    torch.manual_seed(0)
    dense = Recurrent().eval()
    given = subject(dense)
    plan = Plan({name: LayerPlan(0.5, Choice("channel")) for name in given.inventory.names})
    gaps = {}
    for affine in (False, True):
        model = copy.deepcopy(dense)
        RECOVERIES.create(Choice("reconstruct", {"affine": affine})).recover_(model, plan, given)
        gaps[affine] = gap(model, dense)
    assert gaps[True] < gaps[False]


def test_it_keeps_the_laws() -> None:
    check_recovery(RECOVERIES.create(Choice("reconstruct", {"affine": True})))


def test_a_wrong_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match="affine must be true or false, not 1"):
        RECOVERIES.create(Choice("reconstruct", {"affine": 1}))
