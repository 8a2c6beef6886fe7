"""Plans timed interleaved with a reference plan."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.evaluation.profile import profile_settings, profile_table
from autoprune.evaluation.recovery import base
from autoprune.latency.timer import Protocol
from autoprune.plan import Plan
from autoprune.repack import Graph, capture
from tests.evaluation.conftest import PATTERN
from tests.helpers import measured


@pytest.mark.slow
def test_a_plan_as_fast_as_the_reference_has_its_speed_up(evaluator: Evaluator, plans: list[Plan]) -> None:
    paired = PairedEvaluator(evaluator, plans[1], 3.0)  # by the clock that never varies, all are
    assert [measured(paired(plan)).speedup for plan in plans] == pytest.approx([3.0] * 3)
    assert [measured(paired(plan)).score for plan in plans] == [measured(evaluator(plan)).score for plan in plans]


@pytest.mark.slow
def test_the_model_is_captured_once_by_whatever_evaluates_it(
    evaluator: Evaluator, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[nn.Module] = []

    def counted(model: nn.Module, inputs: Any) -> Graph:
        captured.append(model)
        return capture(model, inputs)

    monkeypatch.setattr(base, "capture", counted)
    subject = replace(evaluator.subject, captured={})
    first = replace(evaluator, subject=subject)
    longer = replace(first, subject=replace(subject, table=first.table), protocol=Protocol(samples=2))
    settings = profile_settings(subject, (PATTERN,), batch=1, threads=1)
    profile_table(subject, (PATTERN,), settings, Protocol(samples=1, warmup=1), first.clock)
    for evaluate in (first, longer, PairedEvaluator(longer, plans[0], 2.0)):
        assert measured(evaluate(plans[1])).score < 0.0
    assert len(captured) == 1


def test_the_reference_has_its_own_speed_up_whatever_the_clock_says(evaluator: Evaluator, plans: list[Plan]) -> None:
    paired = PairedEvaluator(replace(evaluator, clock=time.perf_counter), plans[1], 3.0)
    assert measured(paired(plans[1])).speedup == 3.0
    assert measured(paired(plans[2])).speedup != 3.0
