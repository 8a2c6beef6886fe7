"""Agents side by side: equal evaluations, equal measured speed-up, statistics that are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import trim_mean

from autoprune.envs import Problem, PruneEnv
from autoprune.errors import ConfigError, FileError
from autoprune.evaluation.measurement import ByTable, Measurement
from autoprune.pipeline.compare import Job, compare, compare_all, jobs_of, report, uniform_outcome
from autoprune.pipeline.judgement import Judgement
from autoprune.pipeline.outcomes import (
    Outcome,
    OutcomeLog,
    cost_table,
    interquartile_mean,
    interval,
    points_above,
    summary_table,
    task_table,
)
from autoprune.pipeline.yardstick import at_speedup
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.target import Target
from autoprune.testing import EvaluateBy, fake_problem
from tests.helpers import measured

ACTIONS = (Choice("mix"), Choice("coefficient"))
AGENTS = [Choice(name) for name in ("uniform", "greedy", "knapsack", "random", "restarts", "cma_es", "evopress")]


def problem(speedup: float = 2.5) -> Problem:
    fake = fake_problem(Target(speedup=speedup))
    return replace(fake, evaluate=ByTable(fake.evaluate, fake.table))


def slower(of: Problem, share: float = 0.8) -> EvaluateBy:
    """A clock by which every plan is slower than the table says."""

    def measure(plan: Plan) -> Measurement:
        right = measured(of.evaluate(plan))
        return replace(right, speedup=right.speedup * share, latency_ms=right.latency_ms / share)

    return EvaluateBy(measure)


def test_a_plan_is_moved_until_its_measured_speed_up_is_the_target_s() -> None:
    of = problem()
    plan = PruneEnv(of, ACTIONS).solved()
    moved = at_speedup(of, plan, slower(of))
    assert moved is not None
    assert moved.measurement.speedup == pytest.approx(2.5, rel=0.03)
    assert moved.measurement == slower(of)(moved.plan)
    assert moved.measurement.score < measured(of.evaluate(plan)).score  # it had to be pruned further


def test_a_target_over_the_best_engine_is_met_over_that() -> None:
    """Measurements are over torch eager, of which the best engine is here twice as fast."""
    of = replace(problem(1.25), baseline_speedup=2.0)
    env = PruneEnv(of, ACTIONS)
    moved = at_speedup(of, env.solved(), slower(of))
    assert moved is not None
    assert moved.measurement.speedup == pytest.approx(2.5, rel=0.03)
    assert uniform_outcome("t", env, slower(of)).speedup == pytest.approx(2.5, rel=0.03)


def test_searches_are_looked_at_after_each_budget_and_never_get_worse() -> None:
    of = problem()
    found = compare("t", PruneEnv(of, ACTIONS), Choice("cma_es"), 0, (1, 10, 40), of.evaluate)
    assert [each.evaluations for each in found] == [1, 10, 40]
    rewards = [each.reward for each in found]
    assert rewards == sorted(rewards)
    assert all(each.speedup >= 2.5 * 0.98 for each in found)
    accuracy = PruneEnv(replace(of, target=Target(accuracy_drop=0.05)), ACTIONS)
    with pytest.raises(ConfigError, match="speed-up"):
        compare("t", accuracy, Choice("random"), 0, (1,), of.evaluate)


def test_a_stopped_comparison_goes_on_and_rules_run_once(tmp_path: Path) -> None:
    of, log = problem(), OutcomeLog(tmp_path / "outcomes.jsonl")
    env = PruneEnv(of, ACTIONS)
    jobs = jobs_of(AGENTS, 2, (0, 1, 5))
    assert [job for job in jobs if job.agent.name == "greedy"] == [Job(Choice("greedy"), 0, (0,))]
    first = compare_all("t", env, jobs[:4], of.evaluate, log)
    everything = compare_all("t", env, jobs, of.evaluate, log)
    assert everything[: len(first)] == first
    assert compare_all("t", env, jobs, of.evaluate, log) == everything
    keys = [(each.agent, each.seed, each.evaluations) for each in everything]
    assert len(set(keys)) == len(keys) == 3 + 4 * 2 * 2
    text = report(Judgement(everything, 5, [], []))
    assert "knapsack" in text
    assert "cma_es" in text
    log.path.write_text('{"task": 1}\n')
    with pytest.raises(FileError, match="corrupt"):
        log.read()


def outcome(task: str, agent: str, score: float, evaluations: int = 10, seed: int = 0) -> Outcome:
    return Outcome(task, agent, seed, evaluations, 0.0, score, 2.0, 0.0, 0.0)


def test_the_interquartile_mean_is_the_middle_half_s() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25))
    assert interquartile_mean([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    low, high = interval({"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 1.9]})
    assert low <= interquartile_mean([1.0, 1.1, 0.9, 2.0, 2.1, 1.9]) <= high
    assert interval({"a": [1.0, 1.0]}) == (1.0, 1.0)


def test_what_a_search_spent_is_counted() -> None:
    of = problem()
    found = compare("t", PruneEnv(of, ACTIONS), Choice("evopress"), 0, (1, 10), of.evaluate, steps=20)
    assert [(each.trials, each.steps) for each in found] == [(1, 20), (10, 200)]
    rule = compare("t", PruneEnv(of, ACTIONS), Choice("knapsack"), 0, (0,), of.evaluate, steps=20)
    assert [(each.trials, each.steps) for each in rule] == [(0, 0)]
    lines = [line.replace(" ", "") for line in cost_table([*found, *rule]).splitlines()]
    assert any(line.startswith("|evopress|10|") and line.endswith("|200|") for line in lines)
    assert any(line.startswith("|knapsack|0|") for line in lines)
    assert cost_table([outcome("a", "tpe", 0.5)]) == "", "it was not noted"


def test_tables_show_points_above_the_knapsack() -> None:
    outcomes = [
        outcome("a", "knapsack", 0.5, 0),
        outcome("b", "knapsack", 0.7, 0),
        outcome("a", "tpe", 0.52),
        outcome("b", "tpe", 0.72),
    ]
    assert points_above(outcomes, "knapsack", 0) == {"a": [0.0], "b": [0.0]}
    above = points_above(outcomes, "tpe", 10)
    assert [above["a"], above["b"]] == [pytest.approx([2.0]), pytest.approx([2.0])]
    assert "+2.00 [+2.00, +2.00]" in summary_table(outcomes)
    assert "72.00" in task_table(outcomes, 10)
    assert "70.00" in task_table(outcomes, 10)  # a rule has one plan, at any number
