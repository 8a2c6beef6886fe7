"""EvoPress: every plan it makes is on the target, and the best of them gets better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoprune.agents.evopress import EvoPressAgent
from autoprune.agents.harness import search
from autoprune.envs import PruneEnv
from autoprune.errors import ConfigError
from autoprune.evaluation.measurement import Failure
from autoprune.target import Target
from autoprune.testing import EvaluateBy, fake_problem

TARGETS = [Target(speedup=3.0, over="eager"), Target(sparsity=0.7), Target(macs=600_000)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_children_keep_the_target_and_the_best_gets_better(target: Target) -> None:
    problem = fake_problem(target)
    trials = search(EvoPressAgent(), PruneEnv(problem), 80, seed=0).trials
    assert all(problem.meets(trial.plan) for trial in trials)
    assert len({layer.sparsity for layer in trials[0].plan.layers.values()}) == 1, "it begins with every layer alike"
    assert max(trial.measurement.score for trial in trials) > trials[0].measurement.score + 0.01


def test_it_searches_beneath_an_allowed_drop_of_the_score() -> None:
    trials = search(EvoPressAgent(), PruneEnv(fake_problem(Target(accuracy_drop=0.05))), 60, seed=0).trials
    assert len({trial.plan.key for trial in trials}) > 30
    assert max(trial.reward for trial in trials) >= trials[0].reward


def test_screening_by_the_curves_saves_evaluations_where_they_tell_the_truth() -> None:
    problem = fake_problem()  # its score is what its curves say
    screened, all_evaluated = (
        np.mean([search(agent, PruneEnv(problem), 30, seed=seed).best.reward for seed in range(4)])
        for agent in (EvoPressAgent(), EvoPressAgent(offspring=4, survivors=4))
    )
    assert screened > all_evaluated


def test_a_failed_start_is_left_behind() -> None:
    problem, calls = fake_problem(), [0]

    def evaluate(plan: object) -> object:
        calls[0] += 1
        return Failure("diverged") if calls[0] == 1 else problem.evaluate(plan)  # type: ignore[arg-type]

    failing = replace(problem, evaluate=EvaluateBy(evaluate))  # type: ignore[arg-type]
    trials = search(EvoPressAgent(), PruneEnv(failing), 20, seed=0).trials
    assert trials[0].failed
    assert not any(trial.failed for trial in trials[1:])


@pytest.mark.parametrize("given", [{"offspring": 0}, {"survivors": 1.5}, {"offspring": 2, "survivors": 3}])
def test_counts_that_cannot_be_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="evopress"):
        EvoPressAgent(**given)
