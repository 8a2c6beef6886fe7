"""Learning over a family: resumable update by update, and worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoprune.agents import AGENTS
from autoprune.agents.family import FamilyLearner, Update, advantage_of
from autoprune.agents.policy import Policy
from autoprune.agents.sb3 import SB3Agent
from autoprune.envs import PruneEnv
from autoprune.envs.family import FamilyEnv, TaskTarget
from autoprune.evaluation.measurement import Measurement
from autoprune.plan import Plan
from autoprune.randomness import own_randomness
from autoprune.registry import Choice
from autoprune.target import Target
from autoprune.testing import EvaluateBy, fake_problem
from tests.helpers import measured

ACTIONS = (Choice("coefficient"),)


def misjudged() -> list[TaskTarget]:
    """Targets of a problem whose curves say too little of its first layers: what a policy can learn to mend."""
    problem = fake_problem()
    names = problem.inventory.names

    def evaluate(plan: Plan) -> Measurement:
        right = measured(problem.evaluate(plan))
        more = sum(0.5 * plan.layers[name].sparsity ** 3 for name in names[:2])
        return replace(right, score=right.score - more)

    own = replace(problem, evaluate=EvaluateBy(evaluate))
    return [TaskTarget("one", replace(own, target=Target(speedup=speedup))) for speedup in (2.0, 2.5, 3.0)]


def learner(name: str, seed: int = 0) -> FamilyLearner:
    args = {"net": [16]} | ({"episodes_per_update": 2, "minibatches": 2} if name == "ppo" else {})
    agent = AGENTS.create(Choice(name, args))
    assert isinstance(agent, SB3Agent)
    task_targets = misjudged()
    cheap = {"one": task_targets[0].problem.evaluate}
    return FamilyLearner(agent, FamilyEnv(task_targets, ACTIONS, cheap), envs=4, seed=seed)


def advantages(name: str, updates: int, directory: Path, stop_at: int | None = None) -> list[Update]:
    seen: list[Update] = []

    def on_update(update: Update) -> None:
        if update.index == stop_at:
            raise KeyboardInterrupt
        seen.append(update)

    learner(name).learn(updates, directory, on_update)
    return seen


@pytest.mark.parametrize("name", ["ppo", "td3"])
def test_what_others_drew_changes_nothing(name: str, tmp_path: Path) -> None:
    seen = []
    with own_randomness():
        for seed in (1, 2):  # of the process's own generators, which no two processes have alike
            torch.manual_seed(seed)
            np.random.seed(seed)
            seen.append(advantages(name, 6, tmp_path / str(seed)))
    assert seen[0] == seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "td3"])
def test_a_killed_training_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    whole = advantages(name, 24, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        advantages(name, 24, tmp_path / "killed", stop_at=15)
    resumed = advantages(name, 24, tmp_path / "killed")
    assert [update.index for update in resumed] == list(range(10, 24))  # from the last checkpoint on
    assert resumed == whole[10:]


@pytest.mark.slow
def test_learning_pays_and_the_policy_is_saved_without_its_training(tmp_path: Path) -> None:
    learns = learner("ppo")
    envs = [PruneEnv(task_target.problem, ACTIONS) for task_target in misjudged()]
    learns.learn(120, tmp_path, lambda _: None)
    after = [advantage_of(learns.act, env) for env in envs]
    assert np.mean(after) > 0.05  # 0 is the solver's plan, which learning starts from
    learns.save_policy(tmp_path / "policy")
    policy = Policy.load(tmp_path / "policy")
    assert (policy.start, policy.curves, policy.actions) == ("knapsack", True, ACTIONS)
    assert [advantage_of(policy.act, env) for env in envs] == pytest.approx(after)
    observation, _ = envs[0].reset()
    assert np.array_equal(policy.act(observation, 0), learns.act(observation, 0))
