"""Plans timed interleaved with a reference plan."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.plan import Plan
from tests.helpers import measured


def test_a_plan_as_fast_as_the_reference_has_its_speed_up(evaluator: Evaluator, plans: list[Plan]) -> None:
    paired = PairedEvaluator(evaluator, plans[1], 3.0)  # by the clock that never varies, all are
    assert [measured(paired(plan)).speedup for plan in plans] == pytest.approx([3.0] * 3)
    assert [measured(paired(plan)).score for plan in plans] == [measured(evaluator(plan)).score for plan in plans]


def test_the_reference_has_its_own_speed_up_whatever_the_clock_says(evaluator: Evaluator, plans: list[Plan]) -> None:
    paired = PairedEvaluator(replace(evaluator, clock=time.perf_counter), plans[1], 3.0)
    assert measured(paired(plans[1])).speedup == 3.0
    assert measured(paired(plans[2])).speedup != 3.0
