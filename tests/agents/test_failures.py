"""Trials that fail: logged with their reason, never chosen, and no end of a search."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune.agents import AGENTS
from autoprune.agents.base import Agent
from autoprune.agents.baseline import uniform_at
from autoprune.agents.halving import Rung, best_plans, halve
from autoprune.agents.harness import SearchResult, TrialLog, search
from autoprune.agents.sb3 import SB3Agent
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.family import FamilyEnv, task_targets_of
from autoprune.envs.rewards import as_trial, terminal_reward
from autoprune.errors import NumericalError
from autoprune.evaluation.measurement import CachedEvaluate, Evaluated, Failure, Measurement
from autoprune.metric import ACCURACY
from autoprune.pipeline.compare import compare
from autoprune.pipeline.monitor import SearchMonitor
from autoprune.pipeline.yardstick import at_speedup
from autoprune.plan import Plan
from autoprune.progress import SILENT
from autoprune.registry import Choice
from autoprune.report.data import MeasuredPoint
from autoprune.target import Target
from autoprune.testing import EvaluateBy, fake_problem

SEARCHING = [name for name in AGENTS if name not in ("policy", "greedy", "knapsack")]
TARGETS = [Target(speedup=3.0), Target(accuracy_drop=0.02), Target(sparsity=0.6)]
EPISODES = 9  # the whole grid of the uniform rule
REASON = "evaluate returned nan"


def fails(plan: Plan) -> bool:
    """Every third plan, whenever it is evaluated."""
    return hashlib.sha256(plan.key.encode()).digest()[0] % 3 == 0


def failing_problem(target: Target | None = None, *, always: bool = False) -> Problem:
    problem = fake_problem(target)

    def evaluate(plan: Plan) -> Evaluated:
        return Failure(REASON) if always or fails(plan) else problem.evaluate(plan)

    return replace(problem, evaluate=EvaluateBy(evaluate))


def build(name: str) -> Agent:
    return AGENTS.create(Choice(name, {"net": [16]} if issubclass(AGENTS.get(name), SB3Agent) else {}))


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, TARGETS[0]) for name in SEARCHING), *(("random", target) for target in TARGETS[1:])],
    ids=str,
)
def test_a_search_outlives_its_failed_trials(name: str, target: Target, tmp_path: Path) -> None:
    result = search(build(name), PruneEnv(failing_problem(target)), EPISODES, seed=0, directory=tmp_path)
    failed = [trial for trial in result.trials if trial.failed]
    assert len(result.trials) == EPISODES
    assert 0 < len(failed) < EPISODES
    assert all(trial.evaluated == Failure(REASON) for trial in failed)
    assert all(math.isfinite(trial.reward) for trial in result.trials)
    assert result.best in [trial for trial in result.trials if not trial.failed]
    assert not fails(result.plan)
    assert TrialLog(tmp_path / "trials.jsonl").read() == list(result.trials)
    again = search(build(name), PruneEnv(failing_problem(target)), EPISODES, seed=0, directory=tmp_path)
    assert again.trials == result.trials


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dense_score", [0.98, 0.1, -2.3, -250.0])
def test_a_failure_is_rewarded_like_losing_everything(target: Target, dense_score: float) -> None:
    problem = replace(fake_problem(target), dense_score=dense_score)
    failed = terminal_reward(problem, Failure("loss is nan")).total
    halved = dense_score - abs(dense_score) / 2
    assert math.isfinite(failed)
    assert failed < terminal_reward(problem, Measurement(halved, 1.0, 3.0)).total


def test_a_failed_trial_is_not_the_best_even_of_worse_ones() -> None:
    problem = fake_problem(Target(speedup=1.05))
    plan = problem.uniform(0.5)
    slow = as_trial(problem, plan, Measurement(0.0, 100.0, 0.1))
    failed = as_trial(problem, plan, Failure(REASON))
    assert failed.reward > slow.reward
    assert SearchResult((failed, slow)).best == slow
    assert best_plans([failed, slow], 5) == [plan]


@pytest.mark.parametrize("name", ["random", "ppo", "tpe", "policy"])
def test_where_all_trials_fail_the_error_says_so(name: str) -> None:
    actions = (Choice("mix"), Choice("coefficient", {"reach": 1.0}))
    agent = AGENTS.create(Choice(name)) if name == "policy" else build(name)
    env = PruneEnv(failing_problem(always=True), actions if name == "policy" else (Choice("sparsity"),))
    if name == "policy":
        env = PruneEnv(env.problem, agent.policy.actions)  # type: ignore[attr-defined]
    result = search(agent, env, 4, seed=0)
    with pytest.raises(NumericalError, match=f"all 4 trials failed.*{REASON}"):
        _ = result.best


def test_failed_evaluations_are_remembered(tmp_path: Path) -> None:
    problem = failing_problem(always=True)
    plan, path = problem.uniform(0.3), tmp_path / "evaluations.jsonl"
    assert CachedEvaluate(problem.evaluate, path)(plan) == Failure(REASON)
    known = CachedEvaluate(EvaluateBy(lambda _: Measurement(1.0, 1.0, 1.0)), path)
    assert known(plan) == Failure(REASON)
    assert known.all([plan, problem.uniform(0.4)]) == [Failure(REASON), Measurement(1.0, 1.0, 1.0)]


def test_halving_goes_on_without_what_diverged() -> None:
    problem = fake_problem()
    plans = [problem.uniform(sparsity) for sparsity in (0.2, 0.4, 0.6, 0.8)]
    trials = [as_trial(problem, plan, Measurement(0.9, 1.0, 3.0)) for plan in plans]

    def climbed(diverging: set[tuple[int, str]]) -> SearchResult:
        def evaluate_at(steps: int) -> EvaluateBy:
            return EvaluateBy(
                lambda plan: Failure(REASON) if (steps, plan.key) in diverging else Measurement(0.9, 1.0, 3.0)
            )

        ladder = [Rung(2, 10), Rung(1, 20)]
        made = halve(trials, ladder, evaluate_at, lambda *given: as_trial(problem, *given), lambda _: None)
        return SearchResult(tuple(trials), tuple(made))

    assert climbed({(10, plans[0].key)}).plan == plans[1]
    assert climbed({(20, plans[0].key)}).best.fidelity == 10
    nothing = climbed({(10, plans[0].key), (10, plans[1].key)})
    assert len(nothing.halved) == 2
    assert nothing.best.fidelity == 0


def test_comparisons_go_on_without_what_failed() -> None:
    problem = failing_problem()
    env = PruneEnv(problem)
    outcomes = compare("task", env, Choice("random"), 0, [1, 12], problem.evaluate)
    assert all(math.isfinite(each.reward) and math.isfinite(each.score) for each in outcomes)
    all_failed = PruneEnv(failing_problem(always=True))
    assert compare("task", all_failed, Choice("random"), 0, [1, 5], all_failed.problem.evaluate) == []
    assert at_speedup(problem, problem.uniform(0.5), all_failed.problem.evaluate) is None
    assert uniform_at(all_failed, 2.0) is None
    found = uniform_at(env, 2.0)
    assert found is None or not found.failed


def test_a_family_learns_from_episodes_that_fail() -> None:
    good, bad = fake_problem(), failing_problem(always=True)
    assert task_targets_of("bad", bad) == []
    task_targets = [
        replace(task_target, problem=replace(task_target.problem, evaluate=bad.evaluate))
        for task_target in task_targets_of("good", good)
    ]
    env = FamilyEnv(task_targets, (Choice("coefficient"),), {"good": good.evaluate}, measured_share=1.0, seed=3)
    env.reset(seed=3)
    over, rewards = False, []
    info: dict[str, Any] = {}
    while not over:
        _, reward, over, _, info = env.step(env.action_space.sample().astype(np.float32))
        rewards.append(reward)
    assert info["trial"]["failed"] == REASON
    assert "surrogate_error" not in info
    assert all(math.isfinite(reward) for reward in [*rewards, info["advantage"]])


def test_the_monitor_shows_failed_trials_by_their_reward(tmp_path: Path) -> None:
    problem = fake_problem()
    failed = as_trial(problem, problem.uniform(0.5), Failure(REASON))
    good = as_trial(problem, problem.uniform(0.4), Measurement(0.9, 1.0, 3.0))
    with SILENT.bar("search", 60) as bar:
        monitor = SearchMonitor(tmp_path, "", ACCURACY, MeasuredPoint(2.0, 0.98), bar, str)
        for index, trial in enumerate([failed] * 25 + [good] + [failed] * 24):
            monitor.trial(index, trial)
        monitor.close()
        resumed = SearchMonitor(tmp_path, "", ACCURACY, MeasuredPoint(2.0, 0.98), bar, str)
        resumed.resumed([failed, good, failed])
        resumed.trial(3, failed)
        resumed.close()
