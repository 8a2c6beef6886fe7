"""benchmarks/recurrent_training.py: the page it draws of what there is, without any task's data."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from autoprune.files import append_line

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("recurrent_training")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "recurrent_training").mkdir()
    return module


def add(training: ModuleType, variant: dict[str, float], validation: float, test: float) -> None:
    outcome = training.Outcome("moby_dick", training.Variant(**variant), 0, validation, test, 0.0, 0.0, 1.0)
    row = {**asdict(outcome), "variant": variant}  # rows written before there was a dropout have none
    append_line(training.RESULTS / "recurrent_training" / "runs.jsonl", row)


def cells(training: ModuleType) -> list[list[str]]:
    rows = [line for line in training.report().splitlines() if line.startswith("| ") and "pruned" not in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("| ---")]


def test_runs_are_compared_with_the_dense_training_that_validation_prefers(training: ModuleType) -> None:
    add(training, {"weights": 0.8, "states": 1.0}, -2.0, -2.05)
    assert [row[5] for row in cells(training)] == ["-"]  # nothing to compare with yet
    add(training, {"weights": 0.0, "states": 1.0}, -1.99, -1.9)
    add(training, {"dropout": 0.2}, -1.95, -2.0)
    found = {row[0]: row[5] for row in cells(training)}
    assert found == {"dense": "-0.1000", "dense, dropout 0.2": "0.0000", "80% of the weights cut": "0.0500"}
    assert list(found) == ["dense", "dense, dropout 0.2", "80% of the weights cut"]
