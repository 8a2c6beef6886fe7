"""Precision as a choice of each layer: by the solver, by rules, by an action."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from autoprune.agents.base import always, finished_plan, run_episode
from autoprune.agents.rules import KNAPSACK, UNIFORM, rule_plans
from autoprune.envs import ENV_ID, PruneEnv
from autoprune.envs.knapsack import greedy, knapsack, solve
from autoprune.envs.limits import FileSize
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.envs.projection import release_useless
from autoprune.errors import ConfigError
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.target import Target
from autoprune.testing import fake_problem

SPEEDUP, DROP = Target(speedup=3.0, over="eager"), Target(accuracy_drop=0.02)


def planned(target: Target) -> Problem:
    return fake_problem(target, precision="planned")


def in_bytes(plan: Plan) -> list[str]:
    return [name for name, layer in plan.layers.items() if layer.precision == "int8"]


def solved(problem: Problem, greedily: bool = False) -> Plan:
    return solve(problem, PartialPlan.of(problem.uniform(0.5)), greedily)


@pytest.mark.parametrize("greedily", [False, True])
@pytest.mark.parametrize("target", [SPEEDUP, DROP], ids=str)
def test_the_solver_takes_int8_where_it_pays(target: Target, greedily: bool) -> None:
    problem, plain = planned(target), fake_problem(target)
    plan, before = solved(problem, greedily), solved(plain, greedily)
    assert len(in_bytes(plan)) >= 2
    assert problem.inventory.names[0] not in in_bytes(plan), "it cannot be int8, and nothing is gained"
    lost, lost_before = problem.curves.plan_lost(plan)[0].sum(), plain.curves.plan_lost(before)[0].sum()
    if target.speedup is not None:
        assert problem.table.predict_speedup(plan) >= target.speedup * (1 - 1e-9)
        assert lost < lost_before
    else:
        assert lost <= 0.02 * 3.0 * (1 + 1e-6)
        assert problem.table.predict_ms(plan) < plain.table.predict_ms(before)


@pytest.mark.parametrize("greedily", [False, True])
def test_int8_is_taken_only_as_far_as_the_accuracy_budget_goes(greedily: bool) -> None:
    """What a layer loses in int8 alone is beyond what is allowed, however fast it is."""
    problem = planned(Target(accuracy_drop=0.001))  # 0.003 of the loss; int8 costs a layer 0.004
    assert not in_bytes(solved(problem, greedily))
    dearer = replace(problem, target=Target(accuracy_drop=0.003))  # 0.009
    assert 1 <= len(in_bytes(solved(dearer, greedily))) <= 2


def test_greedy_ends_where_the_knapsack_does_if_options_are_out_of_order() -> None:
    cost = np.array([[0.0, 5.0, 1.0, 2.0], [0.0, 9.0, 4.0, 8.0]])
    weight = np.array([[9.0, 3.0, 4.0, 1.0], [9.0, 8.0, 5.0, 1.0]])
    for budget in (2.0, 6.0, 10.0, 18.0):
        assert greedy(cost, weight, budget).tolist() == knapsack(cost, weight, budget).tolist()


def test_a_size_limit_counts_bytes_of_each_layer_s_precision() -> None:
    whole = 4.0 * sum(layer.weights for layer in fake_problem().inventory.layers)
    problem = replace(planned(Target(size_bytes=int(whole / 3))), file=FileSize(0.0, 4.0))
    (limit,) = problem.limits
    assert limit.cost(problem.uniform(0.0)) == whole
    assert limit.cost(replace(problem, layer_precision="int8").uniform(0.0)) == whole / 4
    plan = PruneEnv(problem).solved()
    assert limit.keeps(plan)
    assert in_bytes(plan)


def test_an_action_s_choice_is_kept_by_the_solver() -> None:
    env = PruneEnv(planned(SPEEDUP), (Choice("coefficient"), Choice("precision")))
    of_layer = {unit: in_bytes(finished_plan(env, always(np.array([0.0, unit], np.float32)))) for unit in (-1.0, 1.0)}
    assert of_layer[-1.0] == []
    assert of_layer[1.0] == env.problem.inventory.names[1:]  # the first cannot be int8


@pytest.mark.parametrize("target", [SPEEDUP, DROP], ids=str)
@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_gymnasium_s_checker_passes_with_the_action(target: Target) -> None:
    actions = (Choice("sparsity"), Choice("precision"))
    env = gymnasium.make(ENV_ID, problem=planned(target), actions=actions)
    check_env(env.unwrapped, skip_render_check=True)
    trial = run_episode(PruneEnv(planned(target), actions), always(np.array([0.0, 1.0], np.float32)))
    assert in_bytes(trial.plan)


def test_the_action_is_refused_where_no_plan_says_precisions() -> None:
    with pytest.raises(ConfigError, match="'precision' needs precision 'planned'"):
        PruneEnv(fake_problem(), (Choice("sparsity"), Choice("precision")))
    with pytest.raises(ConfigError, match="options are some of float32, int8"):
        PruneEnv(planned(SPEEDUP), (Choice("precision", {"options": ["int4"]}),))


@pytest.mark.parametrize("target", [SPEEDUP, DROP], ids=str)
def test_the_rules_try_each_precision(target: Target) -> None:
    env = PruneEnv(planned(target), (Choice("mix"), Choice("coefficient", {"reach": 1.0})))
    plans = rule_plans(env, [env.problem.pattern], [env.problem.criterion])
    able = env.problem.inventory.names[1:]
    assert [in_bytes(plan) for plan in plans[UNIFORM]] == [[], able]
    assert in_bytes(plans[KNAPSACK][0])
    alike = env.alike()
    assert {len(in_bytes(finished_plan(alike, always(np.array([0.0, unit], np.float32))))) for unit in (-1, 1)} == {
        0,
        len(able),
    }


def test_a_layer_that_cannot_be_int8_is_planned_in_float32() -> None:
    problem = replace(planned(SPEEDUP), layer_precision="int8")
    plan = problem.uniform(0.5)
    assert in_bytes(plan) == problem.inventory.names
    assert in_bytes(release_useless(plan, problem.table)) == problem.inventory.names[1:]


def test_a_speed_up_that_only_int8_reaches_is_in_reach() -> None:
    reachable = PruneEnv(fake_problem(SPEEDUP)).reachable_speedup()
    problem = planned(Target(speedup=reachable * 1.2, over="eager"))
    env = PruneEnv(problem)
    assert env.reachable_speedup() > reachable * 1.2
    assert problem.table.predict_speedup(env.solved()) >= reachable * 1.2 * (1 - 1e-9)


def test_what_int8_saves_and_loses_is_observed_on_the_way() -> None:
    env = PruneEnv(planned(SPEEDUP), (Choice("sparsity"), Choice("precision")))
    seen = {}
    for unit in (-1.0, 1.0):
        env.reset()
        for _ in range(3):
            observation, *_ = env.step(np.array([0.0, unit], np.float32))
        seen[unit] = env._decided
        assert env.observation_space.contains(observation)
    assert seen[1.0].saved_ms > seen[-1.0].saved_ms
    assert seen[1.0].lost > seen[-1.0].lost
