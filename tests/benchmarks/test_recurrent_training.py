"""`python -m benchmarks recurrent_training`: the page it draws of what there is, without any task's data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from autoprune.files import append_line
from benchmarks import recurrent_training as training


def add(folder: Path, variant: dict[str, float], validation: float, test: float) -> None:
    outcome = training.Outcome("moby_dick", training.Variant(**variant), 0, validation, test, 0.0, 0.0, 1.0)
    row = {**asdict(outcome), "variant": variant}  # rows written before there was a dropout have none
    append_line(folder / "recurrent_training" / "runs.jsonl", row)


def cells(folder: Path) -> list[list[str]]:
    rows = [line for line in training.report(folder).splitlines() if line.startswith("| ") and "pruned" not in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("| ---")]


def test_runs_are_compared_with_the_dense_training_that_validation_prefers(tmp_path: Path) -> None:
    add(tmp_path, {"weights": 0.8, "states": 1.0}, -2.0, -2.05)
    assert [row[5] for row in cells(tmp_path)] == ["-"]  # nothing to compare with yet
    add(tmp_path, {"weights": 0.0, "states": 1.0}, -1.99, -1.9)
    add(tmp_path, {"dropout": 0.2}, -1.95, -2.0)
    found = {row[0]: row[5] for row in cells(tmp_path)}
    assert found == {"dense": "-0.1000", "dense, dropout 0.2": "0.0000", "80% of the weights cut": "0.0500"}
    assert list(found) == ["dense", "dense, dropout 0.2", "80% of the weights cut"]
