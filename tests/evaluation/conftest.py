"""A small evaluation, real but for its clock."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.recovery.train import Train
from autoprune.latency.timer import Protocol
from autoprune.masks import collect_statistics
from autoprune.metric import BITS_PER_CHARACTER
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.evaluations import minus_bits
from autoprune.testing import FakeClock, fake_table, small_cnn

STEP_S = 2.0**-10  # of the clock: its sums are exact, so that differences are the same wherever it stands
PATTERN = Choice("group", {"size": 4})


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Real training, scoring, repacking and timing of a small model, on random data, by a clock that never varies."""
    model, draws = small_cnn().eval(), torch.Generator().manual_seed(0)
    batch = (torch.randn(32, 3, 16, 16, generator=draws), torch.randint(10, (32,), generator=draws))
    task = Task(
        "random", model, (batch,), (batch,), (batch,), (batch,), functional.cross_entropy, None, minus_bits,
        BITS_PER_CHARACTER,
    )  # fmt: skip
    inventory = take_inventory(model, torch.zeros(1, 3, 16, 16))
    statistics = collect_statistics(model, inventory.names, task.calibration, task.loss, frozenset())
    subject = Subject(task, model, inventory, statistics, TrainingSettings(epochs=1, learning_rate=0.1), seed=0)
    table = fake_table(inventory, (PATTERN,))
    return Evaluator(subject, table, Train(2), Protocol(samples=3), clock=FakeClock(STEP_S))


@pytest.fixture(scope="module")
def plans(evaluator: Evaluator) -> list[Plan]:
    names = evaluator.subject.inventory.names
    layers = [LayerPlan(sparsity, PATTERN, Choice("magnitude")) for sparsity in (0.3, 0.5, 0.8)]
    return [Plan(dict.fromkeys(names, layer), Choice("one_shot")) for layer in layers]
