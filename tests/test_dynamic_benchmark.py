"""What benchmarks/dynamic.py makes of its measurements, on figures that are made up."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("dynamic_report")


POINTS = [(1.0, 0.90), (2.0, 0.92), (2.5, 0.91), (4.0, 0.94)]


def test_static_plans_are_compared_along_their_frontier(told: ModuleType) -> None:
    assert told.frontier(POINTS) == [(1.0, 0.90), (2.0, 0.92), (4.0, 0.94)]
    assert told.static_ms(POINTS, 0.93) == pytest.approx(3.0)
    assert told.static_ms(POINTS, 0.5) == 1.0  # the fastest is more accurate
    assert told.static_ms(POINTS, 0.95) is None
    assert told.static_accuracy(POINTS, 1.5) == pytest.approx(0.91)
    assert told.static_accuracy(POINTS, 9.0) == pytest.approx(0.94)
    assert told.static_accuracy(POINTS, 0.5) is None


@pytest.mark.parametrize(("dynamic_ms", "verdict"), [(1.0, "reached: 3.00x"), (2.9, "missed: 1.03x")])
def test_the_report_says_whether_the_bar_is_reached(told: ModuleType, dynamic_ms: float, verdict: str) -> None:
    runs, times = (importlib.import_module(name) for name in ("dynamic_runs", "dynamic_times"))

    def row(ms: float, accuracy: float, variant: object) -> object:
        run = runs.Run(variant, nn.Identity(), accuracy, accuracy - 0.01)
        profile = {"predictors": 1.0, "convolutions": 2.0, "copies": 3.0, "rest": 4.0, "call": 5.0}
        return times.Measured(run, np.full((2, 3), ms), np.full((2, 3), ms / 2), 0.5, 1.1 * ms, profile)

    rows = [row(ms, accuracy, runs.Variant(ms / 10)) for ms, accuracy in POINTS]
    rows += [row(dynamic_ms, 0.93, runs.Variant(0.0, "inner", 0.5)), row(1.5, 0.95, runs.Variant(0.9, "both", 0.5))]
    mechanism = {("[1]", sparsity, share): 1.0 for sparsity in times.SPARSITIES for share in (None, *times.SHARES)}
    text = told.report(rows, mechanism)
    assert f"The bar of 1.2x at equal validation accuracy is {verdict} (inner gates" in text
    assert "1 rows are more accurate than every static plan" in text
    assert text.count("MORE") == 4  # its legend, and the row by each of three measures


def test_variants_have_files_of_their_own(told: ModuleType) -> None:
    runs, benchmark = importlib.import_module("dynamic_runs"), importlib.import_module("dynamic")
    assert len({variant.key for variant in benchmark.VARIANTS}) == len(benchmark.VARIANTS)
    assert str(runs.Variant(0.75, "inner", 0.5)) == "static 75% + inner gates, groups of 4, 50% over all inputs"
