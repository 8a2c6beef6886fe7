"""`python -m benchmarks methods`: what it keeps of a run in rounds, and how it shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.methods_report import Job, Outcome, _rounds
from benchmarks.methods_table import TASKS_SHOWN


@pytest.mark.slow
def test_a_run_in_rounds_keeps_what_each_came_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(methods, "KEPT", tmp_path)
    shown = replace(TASKS_SHOWN["digits"], epochs=4, start_epochs=1)
    outcome = methods.train_one(shown, Job("bayesian_memoryless", "group-90", 0))
    assert len(outcome.rounds) == 8
    assert outcome.rounds[-1] == outcome.validation
    assert all(0.0 <= accuracy <= 1.0 for accuracy in outcome.rounds)
    assert Outcome.from_json(outcome.to_json()) == outcome
    assert not methods.train_one(shown, Job("one_shot", "group-90", 0)).rounds


def test_rounds_are_shown_by_method() -> None:
    runs = [
        Outcome(Job(name, "group-90", seed), 0.9, 0.9, 1.0, {}, 1.0, [first, 0.8])
        for name, seed, first in (("bayesian", 0, 0.7), ("bayesian", 1, 0.9), ("bayesian_memoryless", 0, 0.5))
    ]
    page = _rounds("group-90", runs)
    assert "bayesian (2 seeds)" in page
    assert "80.00 ± 14.14" in page
    assert "50.00" in page
    assert _rounds("group-97", runs) == ""
