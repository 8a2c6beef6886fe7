"""The latency table: layers timed where they run, inside programs, and one by one where there is no program."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.evaluation import profile
from autoprune.evaluation.profile import ANCHORS, WHOLE_ANCHORS, profile_record, profile_settings, profile_table
from autoprune.evaluation.recovery import Subject
from autoprune.files import append_line, read_lines
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Protocol
from autoprune.masks import collect_statistics
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT, Progress
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


class Undecided(nn.Module):
    """Two layers, and a way that depends on data: no program holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y if y.sum() > 0 else -y


def subject(model: nn.Module, x: Tensor) -> Subject:
    batches = tuple(TensorBatches(x, torch.zeros(len(x), dtype=torch.int64), 4))
    task = Task("t", model.eval(), batches, batches, batches, batches, functional.cross_entropy, None)
    inventory = take_inventory(model, (x[:1],))
    statistics = collect_statistics(model, inventory.names, batches, task.loss, frozenset())
    return Subject(task, model, inventory, statistics, TrainingSettings(), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "x", "in_programs"),
    [
        (small_cnn(), torch.randn(4, 3, 16, 16), True),
        (Reader(), torch.randn(4, 5, 16), True),
        (Undecided(), torch.randn(4, 16), False),
    ],
    ids=["cnn", "lstm", "undecided"],
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
    assert 1 <= len(table.whole) <= len(WHOLE_ANCHORS)
    for sparsity in (0.0, 0.5, 0.95):  # the whole table is monotone, and its inverse is one
        plan = Plan({name: LayerPlan(sparsity, PATTERNS[-1]) for name in of.inventory.names})
        assert table.parts_ms(table.predict_ms(plan)) == pytest.approx(table.sum_ms(plan))


@pytest.mark.slow
def test_all_steps_of_a_recurrent_weight_are_one_call_of_the_program() -> None:
    """On its own it does one step a call from Python, which takes as long as many of a program's."""
    of = subject(Reader(), torch.randn(4, 5, 16))
    settings = profile_settings(of, PATTERNS, batch=1, threads=1)
    table = profile_table(of, PATTERNS, settings, Protocol(samples=3), time.perf_counter)
    assert of.inventory["lstm.weight_hh_l0"].calls == 5
    assert {name: layer.calls for name, layer in table.layers.items()} == dict.fromkeys(of.inventory.names, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "x", "cells"),
    [(small_cnn(), torch.randn(4, 3, 16, 16), 1 + 2 * 2), (Undecided(), torch.randn(4, 16), 2 * (1 + 2 * 2))],
    ids=["cnn", "undecided"],
)
def test_a_table_that_is_stopped_goes_on_and_measures_nothing_twice(
    model: nn.Module, x: Tensor, cells: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "ANCHORS", (0.5, 0.9))
    of, path = subject(model, x), tmp_path / "latency.json"
    settings, protocol = profile_settings(of, PATTERNS, batch=1, threads=1), Protocol(samples=1, warmup=1)
    lines_left = 0

    def append(file: Path, line: Mapping[str, Any]) -> None:
        nonlocal lines_left
        lines_left -= 1
        if lines_left < 0:
            raise KeyboardInterrupt
        append_line(file, line)

    def measured(progress: Progress) -> LatencyTable:
        record = profile_record(path, settings, protocol)
        return profile_table(of, PATTERNS, settings, protocol, time.perf_counter, progress, record)

    monkeypatch.setattr("autoprune.latency.record.append_line", append)
    before: list[dict[str, Any]] = []
    for lines_left in (3, 1, 2):  # noqa: B007 - it is counted down
        progress = Said()
        with pytest.raises(KeyboardInterrupt):
            measured(progress)
        told = f"latency table: {len(before) - 1} of its measurements were made before"
        assert progress.told == ([told] if before else [])
        now = read_lines(tmp_path / "latency.cells.jsonl", "the record")
        assert now[: len(before)] == before
        before = now
    assert len(before) == 6
    lines_left = 1000
    table = measured(SILENT)
    everything = read_lines(tmp_path / "latency.cells.jsonl", "the record")
    assert everything[: len(before)] == before
    keys = [line["key"] for line in everything[1:]]
    assert len(set(keys)) == len(keys) == cells + len(WHOLE_ANCHORS)
    lines_left = 0
    assert measured(SILENT) == table  # all of it is known
    assert profile_record(path, {**settings, "batch": 2}, protocol).known == 0
    assert not (tmp_path / "latency.cells.jsonl").exists()


class Said(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)
