"""Laws of metrics: what reads better is scored higher, and a drop reads as worse, whichever way the figure points."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from autoprune.errors import ConfigError, NumericalError
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
    assert ACCURACY.describe(0.98123) == "accuracy 98.12%"
    assert BITS_PER_CHARACTER.describe(-2.0625) == "bits per character 2.0625"
    assert [metric.label for metric in METRICS] == ["accuracy (%)", "bits per character"]
    assert BITS_PER_CHARACTER.tag == "bits_per_character"
    assert ACCURACY.change(-0.003) == "0.30 points of accuracy better"
    assert BITS_PER_CHARACTER.change(0.0312) == "0.0312 bits per character worse"


def test_a_target_is_told_in_the_metric() -> None:
    target = Target(accuracy_drop=0.02)
    assert target.text(ACCURACY) == "at most 2 points of accuracy worse, fastest"
    assert Target(accuracy_drop=0.01).text(ACCURACY) == "at most 1 point of accuracy worse, fastest"
    assert BITS_PER_CHARACTER.allowance(1.0) == "1 bit per character"
    assert target.text(BITS_PER_CHARACTER) == "at most 0.02 bits per character worse, fastest"
    assert Target(speedup=3.0).text(BITS_PER_CHARACTER) == (
        "at least 3x faster than the best dense engine, best bits per character"
    )
    assert Target(sparsity=0.9).text(ACCURACY) == "90% sparsity, best accuracy"


def test_a_metric_without_a_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="the factor of the metric 'loss' must not be 0"):
        Metric("loss", 0.0, "", 3, "nats")


@pytest.mark.parametrize(
    "given",
    [
        0.75, Fraction(3, 4), Decimal("0.75"), np.float32(0.75), np.float64(0.75), np.array(0.75), np.array([[0.75]]),
        torch.tensor(0.75), torch.tensor([0.75], dtype=torch.float16), torch.tensor(0.75, requires_grad=True) * 1,
        {"loss": 3.0, "accuracy": torch.tensor(0.75)},
    ],
    ids=repr,
)  # fmt: skip
def test_a_score_of_any_kind_of_number_is_taken(given: Any) -> None:
    score = ACCURACY.score(given)
    assert type(score) is float
    assert score == 0.75


@pytest.mark.parametrize("given", [1, np.int64(1), torch.tensor(1)], ids=repr)
def test_whole_numbers_are_scores(given: Any) -> None:
    assert ACCURACY.score(given) == 1.0


def test_a_mean_in_float32_may_be_a_rounding_out_of_its_range() -> None:
    assert ACCURACY.score(np.float32(1.0000001)) == 1.0
    assert ACCURACY.score(-1e-9) == 0.0
    assert BITS_PER_CHARACTER.score(5e-7) == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "None (is there a return missing?)"),
        ("0.97", "'0.97', a str"),
        (True, "True, a bool"),
        (torch.tensor(True), "a Tensor of shape ()"),
        (1 + 0j, "a complex"),
        ([0.97], "[0.97], a list"),
        ((0.97, 0.1), "a tuple"),
        (torch.zeros(2), "a Tensor of shape (2,)"),
        (np.zeros((0,)), "a ndarray of shape (0,)"),
        ({}, "a dictionary with nothing in it"),
        ({"acc": 0.9, "loss": 0.1}, "a dictionary with 'acc', 'loss'"),
        ({"accuracy": None}, "a dictionary with 'accuracy'"),
        (math.nan, "returned nan"),
        (torch.tensor(math.inf), "returned inf"),
        (Decimal("NaN"), "returned nan"),
        ({"accuracy": np.float32("nan")}, "returned nan"),
        (97.3, "from 0 to 1: return it in that range (a fraction"),
        (-0.01, "returned -0.01"),
        (1.00001, "returned 1.00001"),
        (10**400, "returned inf"),
        (Decimal("sNaN"), "returned nan"),
        (np.ma.masked, "a MaskedConstant"),
        (np.ma.array([0.5], mask=[True]), "a MaskedArray"),
        (torch.zeros((), device="meta"), "a Tensor of shape ()"),
    ],
    ids=repr,
)
def test_what_is_no_score_is_refused_in_a_sentence(given: Any, said: str) -> None:
    with pytest.raises(NumericalError) as refused:
        ACCURACY.score(given)
    assert said in str(refused.value)


def test_a_metric_of_ones_own_has_the_range_it_says() -> None:
    percent = Metric("mAP", factor=1.0, unit="%", digits=1, points="points of mAP", lowest=0.0, highest=100.0)
    assert percent.score({"mAP": 97.3}) == 97.3
    assert Metric("reward", 1.0, "", 1, "of reward").score(-1e9) == -1e9
    with pytest.raises(NumericalError, match="from -inf to 0"):
        BITS_PER_CHARACTER.score(0.5)
