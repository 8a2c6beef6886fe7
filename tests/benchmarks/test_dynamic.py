"""What `python -m benchmarks dynamic` makes of its measurements, on figures that are made up."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from benchmarks import dynamic, dynamic_report
from benchmarks.dynamic_runs import Run, Variant
from benchmarks.dynamic_times import SHARES, SPARSITIES, Measured

POINTS = [(1.0, 0.90), (2.0, 0.92), (2.5, 0.91), (4.0, 0.94)]


def test_static_plans_are_compared_along_their_frontier() -> None:
    assert dynamic_report.frontier(POINTS) == [(1.0, 0.90), (2.0, 0.92), (4.0, 0.94)]
    assert dynamic_report.static_ms(POINTS, 0.93) == pytest.approx(3.0)
    assert dynamic_report.static_ms(POINTS, 0.5) == 1.0  # the fastest is more accurate
    assert dynamic_report.static_ms(POINTS, 0.95) is None
    assert dynamic_report.static_accuracy(POINTS, 1.5) == pytest.approx(0.91)
    assert dynamic_report.static_accuracy(POINTS, 9.0) == pytest.approx(0.94)
    assert dynamic_report.static_accuracy(POINTS, 0.5) is None


@pytest.mark.parametrize(("dynamic_ms", "verdict"), [(1.0, "reached: 3.00x"), (2.9, "missed: 1.03x")])
def test_the_report_says_whether_the_bar_is_reached(dynamic_ms: float, verdict: str) -> None:
    def row(ms: float, accuracy: float, variant: Variant) -> Measured:
        run = Run(variant, nn.Identity(), accuracy, accuracy - 0.01)
        profile = {"predictors": 1.0, "convolutions": 2.0, "copies": 3.0, "rest": 4.0, "call": 5.0}
        return Measured(run, np.full((2, 3), ms), np.full((2, 3), ms / 2), 0.5, 1.1 * ms, profile)

    rows = [row(ms, accuracy, Variant(ms / 10)) for ms, accuracy in POINTS]
    rows += [
        row(dynamic_ms, 0.93, Variant(0.0, "inner", 0.5)),
        row(1.5, 0.95, Variant(0.9, "both", 0.5)),
    ]
    mechanism = {("[1]", sparsity, share): 1.0 for sparsity in SPARSITIES for share in (None, *SHARES)}
    text = dynamic_report.report(rows, mechanism)
    assert f"The bar of 1.2x at equal validation accuracy is {verdict} (inner gates" in text
    assert "1 rows are more accurate than every static plan" in text
    assert text.count("MORE") == 4  # its legend, and the row by each of three measures


def test_variants_have_files_of_their_own() -> None:
    assert len({variant.key for variant in dynamic.VARIANTS}) == len(dynamic.VARIANTS)
    assert str(Variant(0.75, "inner", 0.5)) == "static 75% + inner gates, groups of 4, 50% over all inputs"
