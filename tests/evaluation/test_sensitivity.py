"""Sensitivity curves against what they stand for: the rise of the loss, and the lost share of the output."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError, FileError
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.sensitivity import ANCHORS, probe_sensitivity
from autoprune.files import read_json, write_json
from autoprune.masks import collect_statistics
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import TensorBatches

PATTERN, CRITERION = Choice("group", {"size": 4}), Choice("magnitude")


class Reader(nn.Module):
    """An LSTM and a classifier of its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


def subject(model: nn.Module, x: Tensor) -> Subject:
    with torch.no_grad():
        y = model.eval()(x).argmax(-1)
    batches = tuple(TensorBatches(x, y, 32))
    task = Task("t", model, batches, batches, batches, batches, functional.cross_entropy, None)
    inventory = take_inventory(model, (x[:1],))
    statistics = collect_statistics(model, inventory.names, batches, task.loss, frozenset())
    return Subject(task, model, inventory, statistics, TrainingSettings(), seed=0)


def cnn(norm: bool) -> Subject:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=not norm)]
    layers += [nn.BatchNorm2d(8)] if norm else []
    layers += [nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)]
    model = nn.Sequential(*layers)
    x = torch.randn(64, 3, 8, 8)
    model.train()(x)
    return subject(model, x)


def masked(of: Subject, name: str, sparsity: float) -> nn.Module:
    plan = Plan({name: LayerPlan(sparsity, PATTERN, CRITERION)})
    model = copy.deepcopy(of.dense)
    with torch.no_grad():
        weight_of(model, name).mul_(of.masks(plan)[name])
    return model


@pytest.mark.parametrize("norm", [False, True])
def test_curves_start_at_nothing_and_never_fall(norm: bool) -> None:
    of = cnn(norm)
    found = probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION)
    for curves in (found.loss, found.error):
        assert list(curves) == of.inventory.names
        for curve in curves.values():
            assert len(curve) == len(ANCHORS)
            assert all(0 <= a <= b for a, b in itertools.pairwise(curve))
    assert all(curve[-1] > 0.2 for curve in found.error.values())


def test_the_loss_is_the_divergence_from_the_dense_predictions_for_a_small_change() -> None:
    """To second order, the rise over the model's own targets is the divergence of its predictions."""
    of = cnn(norm=False)
    name = of.inventory.names[-1]
    with torch.no_grad():
        weight_of(of.dense, name).mul_(0.2)  # near enough for a second-order expansion
    x = torch.cat([batch for batch, _ in of.task.calibration])
    many = tuple(TensorBatches(x.repeat(40, 1, 1, 1), torch.zeros(2560, dtype=torch.int64), 256))
    of = replace(of, task=replace(of.task, calibration=many))
    probe = probe_sensitivity(of, [name], PATTERN, CRITERION)
    with torch.no_grad():
        before, after = of.dense(x).log_softmax(-1), masked(of, name, 0.5)(x).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    # 256 drawn targets: what is left is the noise of drawing them
    assert probe.loss[name][ANCHORS.index(0.5)] == pytest.approx(divergence, rel=0.35)


def test_the_error_is_the_lost_share_of_the_output() -> None:
    of = cnn(norm=False)
    name = of.inventory.names[1]
    found = probe_sensitivity(of, [name], PATTERN, CRITERION)
    x = torch.cat([batch for batch, _ in of.task.calibration])
    assert isinstance(of.dense, nn.Sequential)
    with torch.no_grad():
        inner = of.dense[1](of.dense[0](x))
        whole = functional.conv2d(inner, weight_of(of.dense, name), stride=2)
        left = functional.conv2d(inner, weight_of(masked(of, name, 0.7), name), stride=2)
        centred = whole - whole.mean((0, 2, 3), keepdim=True)
    share = float((whole - left).square().sum() / centred.square().sum())
    assert found.error[name][ANCHORS.index(0.7)] == pytest.approx(share, rel=0.05)  # variances are by batch there


def test_recurrent_weights_and_frozen_models_are_probed_and_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = Reader().requires_grad_(False)
    of = subject(model, torch.randn(48, 5, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION)
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0"} <= set(found.loss)
    assert all(curve[-1] > 0 for curve in found.loss.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_curves_are_kept_and_a_corrupt_file_is_told(tmp_path: Path) -> None:
    of, path = cnn(norm=True), tmp_path / "sensitivity.json"
    first = probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION, path=path)
    assert probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION, path=path) == first
    assert probe_sensitivity(of, of.inventory.names, Choice("group", {"size": 8}), CRITERION, path=path) != first
    retrained = replace(of, dense=copy.deepcopy(of.dense))
    with torch.no_grad():
        weight_of(retrained.dense, of.inventory.names[0]).mul_(1.5)
    assert probe_sensitivity(retrained, of.inventory.names, PATTERN, CRITERION, path=path) != first
    assert probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION, path=path) == first
    data = read_json(path, "the curves")
    data["loss"][of.inventory.names[0]] = [0.1]
    write_json(path, data)
    with pytest.raises(FileError, match="corrupt"):
        probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION, path=path)


def test_a_layer_that_calibration_never_reaches_is_told() -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x) if len(x) > 1 else self.idle(self.used(x))
            return y

    of = subject(Never(), torch.randn(64, 8))
    with pytest.raises(AutopruneError, match="idle"):
        probe_sensitivity(of, of.inventory.names, PATTERN, CRITERION)
