"""The environment's contract, its budget, its shaping, and its determinism."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from autoprune.agents.base import run_episode
from autoprune.envs import ENV_ID, Problem, PruneEnv
from autoprune.envs.actions import ACTIONS
from autoprune.envs.actions.method_argument import MethodArgument
from autoprune.envs.observation import NAMES
from autoprune.envs.partial_plan import PartialPlan
from autoprune.errors import ConfigError, InfeasibleTarget
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.target import Target
from autoprune.testing import fake_problem
from autoprune.training import TRAINING

EVERY_ACTION = tuple(Choice(name) for name in ACTIONS)
TARGETS = [Target(speedup=3.0), Target(accuracy_drop=0.05)]


def play(env: PruneEnv, seed: int) -> tuple[dict[str, Any], float]:
    draws = np.random.default_rng(seed)
    shape = env.action_space.shape
    env.reset(seed=seed)
    total, over = 0.0, False
    info: dict[str, Any] = {}
    while not over:
        _, reward, over, _, info = env.step(draws.uniform(-1, 1, shape).astype(np.float32))
        total += reward
    return info["trial"], total


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_both_checkers_pass(target: Target) -> None:
    env = gymnasium.make(ENV_ID, problem=fake_problem(target, precision="planned"), actions=EVERY_ACTION)
    check_env(env.unwrapped, skip_render_check=True)
    check_env_sb3(env.unwrapped)


def test_observations_have_one_length_for_any_model_and_stay_in_bounds() -> None:
    env = PruneEnv(fake_problem(precision="planned"), EVERY_ACTION)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (len(NAMES) + len(EVERY_ACTION),)
    for _ in range(env.steps_per_episode):
        observation, *_ = env.step(np.ones(len(EVERY_ACTION), np.float32))
        assert env.observation_space.contains(observation)


@given(seed=st.integers(0, 1000))
def test_every_plan_meets_the_speed_up_it_was_projected_to(seed: int) -> None:
    problem = fake_problem(Target(speedup=3.0))
    trial, _ = play(PruneEnv(problem), seed)
    predicted = problem.table.predict_speedup(Plan.from_json(trial["plan"]))
    assert predicted >= 2.97  # what is given back changes nothing the table can see
    assert predicted <= 3.3  # and no plan is pruned much further than it has to be


@given(seed=st.integers(0, 1000), weight=st.floats(0.1, 3.0))
def test_shaping_changes_no_episodes_return(seed: int, weight: float) -> None:
    for target in TARGETS:
        plain = play(PruneEnv(fake_problem(target), shaping=0.0), seed)
        shaped = play(PruneEnv(fake_problem(target), shaping=weight), seed)
        assert plain[0] == shaped[0]
        assert plain[1] == pytest.approx(shaped[1], abs=1e-5)


def test_the_zero_action_is_the_uniform_plan() -> None:
    env = PruneEnv(fake_problem(), (Choice("sparsity"),))
    trial = run_episode(env, lambda *_: np.zeros(1, np.float32))
    pruned = {layer.sparsity for layer in trial.plan.layers.values()} - {0.0}
    assert len(pruned) == 1


def test_an_infeasible_target_is_refused_with_the_best_figure() -> None:
    with pytest.raises(InfeasibleTarget, match=r"500x over the best dense engine.*predicts \d+\.\d\dx at best"):
        PruneEnv(fake_problem(Target(speedup=500.0)))


def test_the_same_seed_gives_the_same_episode_and_a_pickle_survives() -> None:
    env = PruneEnv(fake_problem())
    first = play(env, 3)
    assert play(env, 3) == first
    assert play(pickle.loads(pickle.dumps(env)), 3) == first  # noqa: S301 - a worker process gets it this way


@pytest.mark.parametrize("name", list(ACTIONS))
@pytest.mark.parametrize("unit", [-1.0, -0.3, 0.0, 0.999, 1.0])
def test_every_action_decodes_to_a_valid_plan(name: str, unit: float) -> None:
    problem = fake_problem()
    component = ACTIONS.create(Choice(name))
    layer = problem.inventory.names[0] if component.scope == "layer" else None
    plan = component.decode(unit, problem, PartialPlan.of(problem.uniform(0.5)), layer).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert all(-1.0 <= anchor <= 1.0 for anchor in component.anchors())


@pytest.mark.parametrize("name", list(TRAINING))
@pytest.mark.parametrize("unit", [-1.0, -0.4, 0.0, 0.7, 1.0])
def test_a_methods_strength_is_one_that_it_takes(name: str, unit: float) -> None:
    problem = fake_problem()
    plan = replace(PartialPlan.of(problem.uniform(0.5)), training=Choice(name))
    chosen = ACTIONS.create(Choice("method_strength")).decode(unit, problem, plan, None).training
    TRAINING.create(chosen)
    steered = TRAINING.get(name).strength_range
    assert set(chosen.args) == ({steered[0]} if steered else set())
    if steered:
        assert steered[1] <= chosen.args[steered[0]] <= steered[2]


METHOD_ACTIONS = [name for name in ACTIONS if issubclass(ACTIONS.get(name), MethodArgument)]


@pytest.mark.parametrize("name", list(TRAINING))
@pytest.mark.parametrize("unit", [-1.0, -0.4, 0.0, 0.7, 1.0])
def test_whatever_the_actions_set_is_a_method(name: str, unit: float) -> None:
    problem = fake_problem()
    plan = replace(PartialPlan.of(problem.uniform(0.5)), training=Choice(name))
    for action in METHOD_ACTIONS:
        component = ACTIONS.create(Choice(action))
        assert isinstance(component, MethodArgument)
        before, plan = plan, component.decode(unit, problem, plan, None)
        changed = {key: value for key, value in plan.training.args.items() if before.training.args.get(key) != value}
        assert set(changed) <= set(component.arguments)
        TRAINING.create(plan.training)
    assert Plan.from_json(plan.to_json()) == plan.plan


def test_actions_reach_what_a_method_has_and_nothing_else() -> None:
    problem = fake_problem()
    plan = replace(PartialPlan.of(problem.uniform(0.5)), training=Choice("gradual", {"end": 0.4}))
    for action, unit in (("schedule_exponent", 1.0), ("schedule_rounds", -1.0), ("penalty", 0.0), ("epochs", 1.0)):
        plan = ACTIONS.create(Choice(action)).decode(unit, problem, plan, None)
    assert plan.training == Choice("gradual", {"end": 0.4, "exponent": 8.0, "updates": 4})
    assert plan.settings == {"epochs": 10}
    rounds = ACTIONS.create(Choice("schedule_rounds")).decode(
        1.0, problem, replace(plan, training=Choice("bayesian")), None
    )
    assert rounds.training == Choice("bayesian", {"rounds": 60})


def test_an_agent_may_choose_the_method_and_how_strong_it_is() -> None:
    names = ["gradual", {"name": "adaptive", "freeze": 0.8}]
    actions = (Choice("training_method", {"names": names}), Choice("method_strength"), Choice("sparsity"))
    env = PruneEnv(fake_problem(), actions)
    env.reset(seed=0)
    for step in range(env.steps_per_episode):
        info = env.step(np.array([1.0, -1.0, 0.0] if step == 0 else [0.0, 0.0, 0.0], np.float32))[4]
    assert info["trial"]["plan"]["training"] == {"name": "adaptive", "args": {"freeze": 0.8, "look_ahead": 1.0}}


def zeros(problem: Problem, plan: Plan) -> float:
    weights = {name: problem.inventory[name].weights for name in plan.layers}
    return sum(weights[name] * layer.sparsity for name, layer in plan.layers.items()) / sum(weights.values())


def test_every_plan_has_the_sparsity_that_was_asked_for() -> None:
    problem = replace(fake_problem(), target=Target(sparsity=0.8))
    env = PruneEnv(problem, (Choice("sparsity"),))
    draws = np.random.default_rng(0)
    shares = set()
    for _ in range(5):
        trial = run_episode(env, lambda *_: draws.uniform(-1, 1, 1).astype(np.float32))
        plan = trial.plan
        assert 0.8 <= zeros(problem, plan) < 0.83
        assert trial.reward == pytest.approx(10 * (trial.measurement.score - problem.dense_score))
        shares.add(tuple(layer.sparsity for layer in plan.layers.values()))
    assert len(shares) == 5


def test_a_recipe_alone_is_decided_in_one_step() -> None:
    problem = replace(fake_problem(), target=Target(sparsity=0.8))
    env = PruneEnv(problem, (Choice("training_method"), Choice("schedule_end")))
    env.reset(seed=0)
    _, _, over, _, info = env.step(np.array([0.0, 1.0], np.float32))
    assert over
    assert info["trial"]["plan"]["training"] == {"name": "gradual", "args": {"end": 0.6}}
    assert all(layer["sparsity"] == 0.8 for layer in info["trial"]["plan"]["layers"].values())


def test_a_sparsity_no_layer_may_have_is_infeasible() -> None:
    problem = replace(fake_problem(), target=Target(sparsity=0.99))
    with pytest.raises(InfeasibleTarget, match="99% zeros"):
        PruneEnv(problem, (Choice("sparsity"),))


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        ((), "needs an action"),
        ((Choice("sparsity"), Choice("sparsity")), "listed twice"),
        ((Choice("sparsty"),), "Did you mean 'sparsity'"),
        ((Choice("sparsity"), Choice("criterion", {"names": ["magnitud"]})), "Did you mean 'magnitude'"),
        ((Choice("sparsity"), Choice("group_size", {"sizes": [0]})), "positive integers"),
        ((Choice("sparsity"), Choice("training_method", {"names": ["gradul"]})), "Did you mean 'gradual'"),
        ((Choice("sparsity"), Choice("training_method", {"names": [{"name": "gradual", "ende": 1}]})), "mean 'end'"),
        ((Choice("sparsity"), Choice("method_strength"), Choice("training_method")), "list 'training_method' before"),
        ((Choice("sparsity"), Choice("schedule_end", {"low": 0.5, "high": 0.2})), "low < high"),
        ((Choice("sparsity"), Choice("schedule_rounds", {"low": 0})), "1 <= low"),
        ((Choice("sparsity"), Choice("schedule_exponent", {"high": "8"})), "high='8'"),
        ((Choice("sparsity"), Choice("allocation", {"options": ["erc"]})), "Did you mean 'erk'"),
        ((Choice("sparsity"), Choice("allocation", {"options": []})), "at least one"),
        ((Choice("sparsity"), Choice("penalty", {"options": ["l2"]})), "Did you mean 'l1'"),
        ((Choice("sparsity"), Choice("epochs", {"low": 3, "high": 3})), "whole numbers"),
    ],
)
def test_wrong_actions_say_what_is_allowed(actions: tuple[Choice, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PruneEnv(fake_problem(), actions)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"over": "best"},
        {"speedup": 0.5},
        {"speedup": 2.0, "over": "tensorrt"},
        {"accuracy_drop": 2.0},
        {"latency_ms": 0.0},
        {"size_bytes": -1},
        {"macs": float("nan")},
    ],
)
def test_a_target_is_of_sensible_numbers(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Target(**arguments)
