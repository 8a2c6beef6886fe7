"""On a busy machine: no trial that is chosen, or shown as the best, is far from the truth."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import nn

from autoprune.config import LatencySection
from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.latency.timer import Protocol
from autoprune.plan import Plan
from tests.helpers import measured

OFF = 0.15  # of the truth, at most
DENSE_S = 400e-6
LASTS_S = 1e-3
LATENCY = LatencySection()  # as a config has it


class BusyClock:
    """A machine's time: what is called takes its time, and three times that while another program is at work.

    Both states last about as long as a sample, at random, so that two candidates of one round feel them differently:
    what lasts longer falls on both alike, and cancels.
    """

    def __init__(self, seed: int) -> None:
        self._draws = random.Random(seed)
        self._now_s, self._slow, self._until_s = 0.0, False, 0.0

    def __call__(self) -> float:
        return self._now_s

    def pass_(self, seconds: float) -> None:
        """Lets so much undisturbed time's worth of work be done."""
        while seconds > 0.0:
            if self._now_s >= self._until_s:
                self._slow = not self._slow
                self._until_s = self._now_s + self._draws.expovariate(1.0 / LASTS_S)
            slowdown = 3.0 if self._slow else 1.0
            done = min(seconds, (self._until_s - self._now_s) / slowdown)
            self._now_s += done * slowdown
            seconds -= done


@dataclass(frozen=True)
class Machine:
    """The plans' true speed-ups, and an evaluator that times them by the clock."""

    evaluator: Evaluator
    truth: Callable[[Plan], float]


@pytest.fixture(params=(5, 8, 11))
def machine(request: pytest.FixtureRequest, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> Machine:
    clock, table = BusyClock(request.param), evaluator.table

    class Dense(nn.Module):
        def forward(self, *_: Any) -> None:
            clock.pass_(DENSE_S)

    def truth(plan: Plan) -> float:
        off = random.Random(plan.key).uniform(0.85, 1.15)  # as tables are
        return float(off * table.predict_speedup(plan))

    def repacked(_: Evaluator, __: nn.Module, plan: Plan) -> Any:
        return lambda: clock.pass_(DENSE_S / truth(plan))

    monkeypatch.setattr(Evaluator, "masked_model", lambda self, plan: self.subject.dense)
    monkeypatch.setattr(Evaluator, "repacked", repacked)
    monkeypatch.setattr(Evaluator, "score", lambda *_: 0.9)
    subject = replace(evaluator.subject, dense=Dense())
    return Machine(
        replace(evaluator, subject=subject, protocol=Protocol(samples=LATENCY.search_samples), clock=clock), truth
    )


def test_what_is_shown_as_best_and_what_is_chosen_is_near_the_truth(machine: Machine, plans: list[Plan]) -> None:
    evaluate, first, drawn = machine.evaluator, plans[0], random.Random(0)
    trials = [first.with_sparsities({name: drawn.uniform(0.3, 0.95) for name in first.layers}) for _ in range(40)]
    speedups = [measured(evaluate(plan)).speedup for plan in trials]
    for at, plan in enumerate(trials):
        if speedups[at] == max(speedups[: at + 1]):  # it is shown as the best so far
            assert speedups[at] == pytest.approx(machine.truth(plan), rel=OFF)
    finalists = sorted(trials, key=lambda plan: -speedups[trials.index(plan)])[:5]
    longer = replace(evaluate, protocol=Protocol(samples=LATENCY.samples, lead=1))
    paired = PairedEvaluator(longer, finalists[0], measured(longer(finalists[0])).speedup)
    again = [measured(paired(plan)).speedup for plan in finalists]
    chosen = finalists[again.index(max(again))]
    assert max(again) == pytest.approx(machine.truth(chosen), rel=OFF)
