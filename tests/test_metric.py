"""Laws of metrics: what reads better is scored higher, and a drop reads as worse, whichever way the figure points."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoprune.errors import ConfigError
from autoprune.metric import ACCURACY, BITS_PER_CHARACTER, Metric
from autoprune.target import Target

METRICS = (ACCURACY, BITS_PER_CHARACTER)
SCORES = st.floats(-8.0, 1.0)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.tag)
@given(score=SCORES, other=SCORES)
def test_a_drop_is_the_difference_of_the_figures_and_reads_as_worse(metric: Metric, score: float, other: float) -> None:
    assume(abs(score - other) > 1e-3)
    points, _, rest = metric.change(score - other).partition(" ")
    assert float(points) == pytest.approx(abs(metric.figure(score) - metric.figure(other)), abs=10.0**-metric.digits)
    assert rest == f"{metric.points} {'worse' if other < score else 'better'}"
    assert metric.change(other - score) != metric.change(score - other)


@given(score=SCORES, drop=st.floats(0.001, 1.0))
def test_fewer_bits_are_better_and_more_accuracy_is(score: float, drop: float) -> None:
    assert BITS_PER_CHARACTER.figure(score - drop) > BITS_PER_CHARACTER.figure(score)
    assert ACCURACY.figure(score - drop) < ACCURACY.figure(score)


def test_figures_read_as_themselves() -> None:
    assert ACCURACY.said(0.98123) == "accuracy 98.12%"
    assert BITS_PER_CHARACTER.said(-2.0625) == "bits per character 2.0625"
    assert [metric.label for metric in METRICS] == ["accuracy (%)", "bits per character"]
    assert BITS_PER_CHARACTER.tag == "bits_per_character"
    assert ACCURACY.change(-0.003) == "0.30 points of accuracy better"
    assert BITS_PER_CHARACTER.change(0.0312) == "0.0312 bits per character worse"


def test_a_target_is_told_in_the_metric() -> None:
    target = Target(accuracy_drop=0.02)
    assert target.text(ACCURACY) == "at most 2 points of accuracy worse, fastest"
    assert target.text(BITS_PER_CHARACTER) == "at most 0.02 bits per character worse, fastest"
    assert Target(speedup=3.0).text(BITS_PER_CHARACTER) == "at least 3x faster, best bits per character"
    assert Target(sparsity=0.9).text(ACCURACY) == "90% sparsity, best accuracy"


def test_a_metric_without_a_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="the factor of the metric 'loss' must not be 0"):
        Metric("loss", 0.0, "", 3, "nats")
