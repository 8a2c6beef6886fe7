"""Successive halving: fewer plans, more steps, and no reward compared with another fidelity's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoprune.agents.halving import Rung, halve, of_highest_fidelity, rungs
from autoprune.agents.harness import SearchResult
from autoprune.envs.trial import Reward, Trial
from autoprune.errors import ConfigError
from autoprune.evaluation.measurement import Evaluate, Evaluated, Measurement
from autoprune.plan import Plan
from autoprune.testing import fake_problem
from tests.helpers import measured

PLANS = [fake_problem().uniform(0.1 * (index + 1)) for index in range(6)]
CHEAP = [
    Trial(plan, Measurement(0.5, 1.0, 2.0), reward, Reward(reward, 0.0))
    for plan, reward in zip(PLANS, (5.0, 9.0, 7.0, 8.0, 6.0, 4.0), strict=True)
]
REAL = dict(zip((plan.key for plan in PLANS), (0.0, 0.1, 0.9, 0.5, 0.99, 1.0), strict=True))  # score once trained


def evaluations(asked: list[tuple[int, str]]) -> Callable[[int], Evaluate]:
    class Trained(Evaluate):
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def __call__(self, plan: Plan) -> Measurement:
            asked.append((self.steps, plan.key))
            return Measurement(REAL[plan.key] - 1.0 / self.steps, 1.0, 2.0)

    return Trained


def as_trial(plan: Plan, outcome: Evaluated) -> Trial:
    score = measured(outcome).score
    return Trial(plan, outcome, score, Reward(score, 0.0))


def test_the_ladder_ends_with_one_plan() -> None:
    assert rungs(4, 10, 2) == (Rung(4, 10), Rung(2, 20), Rung(1, 40))
    assert rungs(5, 1, 3) == (Rung(5, 1), Rung(2, 3), Rung(1, 9))


@pytest.mark.parametrize("wrong", [(1, 10, 2), (4, 0, 2), (4, 10, 1)])
def test_a_ladder_of_nothing_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="successive halving needs"):
        rungs(*wrong)


def test_what_is_best_once_trained_wins_though_it_looked_worse() -> None:
    asked: list[tuple[int, str]] = []
    seen: list[Trial] = []
    climbed = halve(CHEAP, rungs(4, 10, 2), evaluations(asked), as_trial, seen.append)
    key = [plan.key for plan in PLANS]
    assert asked == [
        *((10, key[index]) for index in (1, 3, 2, 4)),
        *((20, key[index]) for index in (4, 2)),
        (40, key[4]),
    ]
    assert seen == climbed
    best = SearchResult(tuple(CHEAP), tuple(climbed)).best
    assert best.plan == PLANS[4]
    assert best.fidelity == 40
    assert best.reward < max(trial.reward for trial in CHEAP), "cheap rewards are of another kind"
    assert len(of_highest_fidelity([*CHEAP, *climbed[:4]])) == 4


def test_equal_plans_are_trained_once() -> None:
    asked: list[tuple[int, str]] = []
    halve([CHEAP[1], CHEAP[1], CHEAP[0]], rungs(3, 10, 3), evaluations(asked), as_trial, lambda _: None)
    assert [steps for steps, _ in asked] == [10, 10, 30]


def test_a_climb_that_was_stopped_goes_on() -> None:
    whole = halve(CHEAP, rungs(4, 10, 2), evaluations([]), as_trial, lambda _: None)
    asked: list[tuple[int, str]] = []
    again = halve(CHEAP, rungs(4, 10, 2), evaluations(asked), as_trial, lambda _: None, whole[:5])
    assert again == whole
    assert [steps for steps, _ in asked] == [20, 40]


def test_without_a_climb_the_best_is_the_searchs() -> None:
    assert SearchResult(tuple(CHEAP)).best is CHEAP[1]
