"""A family as one environment: advantages over the solver, and surrogates that tell plans apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from autoprune.envs.family import FRACTIONS, FamilyEnv, TaskTarget, speedup_at, task_targets_of
from autoprune.envs.problem import Problem
from autoprune.envs.surrogate import FEWEST, fit_surrogate
from autoprune.errors import AutopruneError
from autoprune.evaluation.measurement import Measurement
from autoprune.pipeline.generalist import surrogate_plans
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.target import Target
from autoprune.testing import EvaluateBy, fake_problem
from tests.helpers import measured

ACTIONS = (Choice("coefficient"),)


def family(measured_share: float = 0.0, seed: int = 0) -> FamilyEnv:
    problem = fake_problem()
    task_targets = [
        TaskTarget("one", replace(problem, target=Target(speedup=each))) for each in (1.5, 2.0, 2.5, 3.0, 4.0)
    ]
    return FamilyEnv(task_targets, ACTIONS, {"one": problem.evaluate}, measured_share=measured_share, seed=seed)


def played(env: gymnasium.Env[np.ndarray, np.ndarray], unit: float) -> dict[str, Any]:
    env.reset()
    over = False
    info: dict[str, Any] = {}
    while not over:
        *_, over, _, info = env.step(np.full(1, unit, np.float32))
    return info


def test_the_family_is_a_gymnasium_environment() -> None:
    check_env(family(), skip_render_check=True)


def test_the_zero_action_has_no_advantage_and_the_return_is_the_advantage() -> None:
    assert played(family(), 0.0)["advantage"] == pytest.approx(0.0)
    env = family()
    env.reset()
    over, total, draws = False, 0.0, np.random.default_rng(1)
    while not over:
        _, reward, over, _, info = env.step(draws.uniform(-1, 1, 1).astype(np.float32))
        total += float(reward)
    assert total == pytest.approx(info["advantage"])


def test_a_seed_draws_the_same_task_targets_and_reseeding_starts_again() -> None:
    def speedups(env: FamilyEnv) -> list[object]:
        return [played(env, 0.3)["trial"]["plan"] for _ in range(6)]

    first, second = family(seed=3), family(seed=4)
    first.reseed((7, 1))
    second.reseed((7, 1))
    assert speedups(first) == speedups(second)
    assert speedups(family(seed=3)) != speedups(family(seed=4))


def test_measured_episodes_say_how_far_off_the_surrogate_is() -> None:
    problem = fake_problem()

    def wrong(plan: Plan) -> Measurement:
        right = measured(problem.evaluate(plan))
        return replace(right, score=right.score - 0.125)

    env = FamilyEnv(task_targets_of("one", problem), ACTIONS, {"one": EvaluateBy(wrong)}, measured_share=1.0)
    info = played(env, 0.5)
    assert info["measured"]
    assert info["surrogate_error"] == pytest.approx(0.125)


def test_task_targets_lose_something_but_not_all() -> None:
    problem = fake_problem()
    task_targets = task_targets_of("one", problem)
    assert task_targets
    assert {task_target.fraction for task_target in task_targets} < set(FRACTIONS)
    assert all(
        task_target.problem.target.speedup == speedup_at(problem, task_target.fraction) for task_target in task_targets
    )
    unhurt = EvaluateBy(lambda plan: replace(measured(problem.evaluate(plan)), score=problem.dense_score))
    sturdy = replace(problem, evaluate=unhurt)
    assert task_targets_of("sturdy", sturdy) == []
    with pytest.raises(AutopruneError, match="family"):
        FamilyEnv([], ACTIONS, {})


def test_a_drop_of_the_score_is_a_target_too() -> None:
    problem = fake_problem()
    task_targets = task_targets_of("one", problem, fractions=(), drops=(1e-6, 0.05, 0.1))
    assert [task_target.problem.target.accuracy_drop for task_target in task_targets] == [0.05, 0.1]
    env = FamilyEnv(task_targets, ACTIONS, {"one": problem.evaluate})
    assert played(env, 0.0)["advantage"] == pytest.approx(0.0)
    assert played(env, 0.5)["trial"]["speedup"] > 1.0


def test_a_surrogate_tells_plans_apart_that_it_has_not_seen() -> None:
    problem: Problem = fake_problem()
    plans = surrogate_plans(problem, 80, seed=0)
    surrogate = fit_surrogate(problem, plans, [measured(problem.evaluate(plan)).score for plan in plans])
    fresh = surrogate_plans(problem, 30, seed=1)
    off = [abs(surrogate(plan).score - measured(problem.evaluate(plan)).score) for plan in fresh]
    assert np.mean(off) < 0.02
    assert surrogate.rank > 0.95
    assert surrogate(fresh[0]).speedup == pytest.approx(measured(problem.evaluate(fresh[0])).speedup)
    with pytest.raises(AutopruneError, match=str(FEWEST)):
        fit_surrogate(problem, plans[:3], [0.0] * 3)


def test_task_targets_share_the_problem_s_curves() -> None:
    problem = fake_problem()
    task_targets: list[TaskTarget] = task_targets_of("one", problem)
    assert all(task_target.problem.curves is problem.curves for task_target in task_targets)


def test_twins_share_what_never_changes_and_not_their_episodes() -> None:
    first = family(seed=0)
    second = first.twin(5)
    alone = family(seed=5)
    alone.reseed((5,))
    first.reset()
    first.step(np.full(1, 0.7, np.float32))
    assert played(second, 0.4) == played(alone, 0.4)
    assert first._envs is not second._envs
