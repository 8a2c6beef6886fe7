"""The latency table: layers timed where they run, inside programs, and one by one where there is no program."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.evaluation.profile import ANCHORS, profile_settings, profile_table
from autoprune.evaluation.recovery import Subject
from autoprune.inventory import take_inventory
from autoprune.latency.timer import Protocol
from autoprune.masks import collect_statistics
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import TensorBatches
from autoprune.testing import small_cnn

PATTERNS = (Choice("group", {"size": 4}), Choice("group", {"size": 8}))


class Reader(nn.Module):
    """An LSTM and a classifier of its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


def subject(model: nn.Module, x: Tensor) -> Subject:
    batches = tuple(TensorBatches(x, torch.zeros(len(x), dtype=torch.int64), 4))
    task = Task("t", model.eval(), batches, batches, batches, batches, functional.cross_entropy, None)
    inventory = take_inventory(model, (x[:1],))
    statistics = collect_statistics(model, inventory.names, batches, task.loss, frozenset())
    return Subject(task, model, inventory, statistics, TrainingSettings(), seed=0)


@pytest.mark.parametrize(
    ("model", "x", "in_programs"),
    [(small_cnn(), torch.randn(4, 3, 16, 16), True), (Reader(), torch.randn(4, 5, 16), False)],
    ids=["cnn", "lstm"],
)
def test_every_layer_has_a_curve_for_every_pattern(model: nn.Module, x: Tensor, in_programs: bool) -> None:
    of = subject(model, x)
    settings = profile_settings(of, PATTERNS, batch=1, threads=1)
    table = profile_table(of, PATTERNS, settings, Protocol(samples=3), time.perf_counter)
    assert list(table.layers) == of.inventory.names
    for layer in table.layers.values():
        assert list(layer.curves) == [str(pattern) for pattern in PATTERNS]
        assert all([point.sparsity for point in curve] == [0.0, *ANCHORS] for curve in layer.curves.values())
        assert all(curve[0] == layer.curve(str(PATTERNS[0]))[0] for curve in layer.curves.values())
        assert layer.dense_us > 0
        if in_programs:
            assert {point.backend for curve in layer.curves.values() for point in curve} <= {"jit", "torch"}
    if in_programs:
        assert table.scale == 1.0  # what was timed inside programs is what it takes there
    assert table.rest_ms >= 0.0
