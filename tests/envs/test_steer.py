"""Steering's environment: found by its name, deterministic, exact on its target, saved and resumed in its middle."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from autoprune.envs import STEER_ID
from autoprune.envs.steer import FIXED, WORST, Slices, SteerEnv, SteerProblem
from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks import Task
from autoprune.testing.cases import CONV_NET_INPUT, LOSS, conv_net, inventory_of_conv_net, random_batches
from autoprune.training import TRAINING, train_
from autoprune.training.loop import SteppedTraining
from autoprune.training.steered import Steered
from autoprune.training.steering import ACTION_NAMES, OBSERVATION_NAMES

SLICES_OF_TESTS, STEPS = 4, 2


def problem(name: str = "one", sparsity: float = 0.8, pattern: Choice = Choice("group", {"size": 4})) -> SteerProblem:  # noqa: B008 - frozen
    model = conv_net().eval()
    inventory = inventory_of_conv_net(model)
    batches = random_batches()
    task = Task(
        name, model, batches, tuple(batches[:2]), batches, batches, LOSS, None,
        examples=(torch.zeros(1, *CONV_NET_INPUT),),
    )  # fmt: skip
    plan = Plan(dict.fromkeys(inventory.names, LayerPlan(sparsity, pattern)))
    return SteerProblem(name, task, model, inventory, plan, TrainingSettings(learning_rate=0.05))


def made(**given: Any) -> SteerEnv:
    return SteerEnv(
        given.pop("problems", problem()), **{"slices": SLICES_OF_TESTS, "steps": STEPS, "seeds": 2, **given}
    )


def drawn(seed: int) -> Iterator[NDArray[np.float32]]:
    draws = np.random.default_rng(seed)
    while True:
        yield draws.uniform(-1.0, 1.0, len(ACTION_NAMES)).astype(np.float32)


def episode(env: gymnasium.Env[Any, Any], seed: int = 3) -> list[Any]:
    observation, info = env.reset(seed=seed)
    seen, over, actions = [observation.tolist(), info], False, drawn(seed)
    while not over:
        observation, reward, over, truncated, info = env.step(next(actions))
        assert not truncated
        seen += [observation.tolist(), reward, info]
    return seen


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_both_checkers_pass_and_it_is_found_by_its_name() -> None:
    env = gymnasium.make(STEER_ID, problems=problem(), slices=2, steps=1, seeds=1)
    assert isinstance(env.unwrapped, SteerEnv)
    assert env.spec is not None
    assert env.spec.max_episode_steps is None
    check_env(env.unwrapped, skip_render_check=True)
    check_env_sb3(env.unwrapped)


def test_an_episode_is_a_function_of_its_actions_and_disturbs_no_random_numbers() -> None:
    shared = problem()
    before = torch.get_rng_state()
    first = episode(made(problems=shared))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert episode(made()) == first
    weights = shared.dense.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in conv_net().state_dict().items())
    assert len(first[0]) == len(OBSERVATION_NAMES)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", [Choice("unstructured"), Choice("group", {"size": 4}), Choice("filter")], ids=str)
def test_the_last_step_meets_the_target_whatever_is_ordered(pattern: Choice, seed: int) -> None:
    env = made(problems=problem(pattern=pattern, sparsity=0.6))
    result = episode(env, seed)[-1]["steering"]
    fixed = env.problem.trained(TRAINING.create(FIXED["lamp"]), SLICES_OF_TESTS, STEPS, 0)
    cut = sum(int((~mask).sum()) for mask in fixed.masks.values())
    weights = sum(layer.weights for layer in env.problem.inventory.layers)
    largest = max(layer.weights // layer.weight_shape[0] for layer in env.problem.inventory.layers) * 4
    assert abs(result["sparsity"] - 0.6) <= largest / weights
    assert abs(result["sparsity"] - cut / weights) <= 2 * largest / weights
    if pattern.name == "unstructured":
        assert result["sparsity"] == pytest.approx(0.6, abs=len(env.problem.inventory.layers) / weights)


def test_rewards_are_paired_and_shaping_changes_no_return() -> None:
    returns = {}
    for shaping in (0.0, 0.7):
        seen = episode(made(shaping=shaping))
        rewards, result = seen[3::3], seen[-1]["steering"]
        returns[shaping] = sum(rewards)
        assert result["advantage"] == pytest.approx((result["score"] - max(result["fixed"].values())) / 0.03)
        assert sum(rewards) == pytest.approx(result["advantage"])
        assert any(rewards[:-1]) == (shaping > 0.0)
        json.dumps(result)
    assert returns[0.0] == pytest.approx(returns[0.7])


def test_fixed_schedules_train_on_the_same_batches_for_as_many_steps() -> None:
    subject = problem()
    scores = subject.fixed_scores(SLICES_OF_TESTS, STEPS, 5)
    model = copy.deepcopy(subject.dense)
    pruner = subject.training(Steered(slices=1), SLICES_OF_TESTS, STEPS, 5).method.pruner
    train_(
        model, Slices(subject.task.train, STEPS), LOSS, subject.settings.changed({"epochs": SLICES_OF_TESTS}), seed=5,
        method=TRAINING.create(FIXED["erk"]), pruner=replace(pruner, model=model),
    )  # fmt: skip
    assert scores["erk"] == subject.task.evaluate(model)
    assert subject.fixed_scores(SLICES_OF_TESTS, STEPS, 5) is scores


def test_the_method_without_a_policy_is_the_zero_action() -> None:
    subject = problem()
    by_method = subject.trained(Steered(slices=SLICES_OF_TESTS), SLICES_OF_TESTS, STEPS, 1)
    env = made(problems=subject)
    env.reset(options={"seed": 1})
    over = False
    while not over:
        model = env._under_way[1].model if env._under_way else None
        *_, over, _, _ = env.step(np.zeros(len(ACTION_NAMES), np.float32))
    assert model is not None
    other = model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in by_method.model.state_dict().items())


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_episode_goes_on_from_its_middle(at: int, tmp_path: Path) -> None:
    env, other, actions = made(), made(), drawn(1)
    env.reset(seed=4)
    for _ in range(at):
        last = env.step(next(actions))[0]
    env.save(tmp_path)
    rest = [next(actions) for _ in range(SLICES_OF_TESTS - at)]
    whole = [env.step(action) for action in rest]
    observation = other.load(tmp_path)
    if at:
        assert np.array_equal(observation, last)
    for action, step in zip(rest, whole, strict=True):
        found = other.step(action)
        assert np.array_equal(found[0], step[0])
        assert found[1:] == step[1:]
    assert np.array_equal(env.reset()[0], other.reset()[0]), "what follows is drawn alike, too"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_an_episode_of_something_else_is_refused(tmp_path: Path) -> None:
    env = made()
    with pytest.raises(AutopruneError, match="no episode to save"):
        env.save(tmp_path)
    with pytest.raises(FileError):
        env.load(tmp_path)
    env.reset(seed=0)
    env.save(tmp_path)
    for other in (made(problems=problem("two")), made(steps=3), made(slices=3)):
        with pytest.raises(FileError, match="does not fit"):
            other.load(tmp_path)
    (tmp_path / "training.safetensors").unlink()
    with pytest.raises(FileError, match="not found"):
        env.load(tmp_path)


@pytest.mark.parametrize(
    "action", [np.zeros(3), np.full(len(ACTION_NAMES), 2.0), None, np.full(len(ACTION_NAMES), np.nan)]
)
def test_what_is_no_action_is_refused_and_costs_no_step(action: Any) -> None:
    env, plain = made(), made()
    for each in (env, plain):
        each.reset(seed=0)
    with pytest.raises(gymnasium.error.InvalidAction):
        env.step(action)
    zero = np.zeros(len(ACTION_NAMES), np.float32)
    assert np.array_equal(env.step(zero)[0], plain.step(zero)[0])


def test_a_step_needs_an_episode() -> None:
    env = made()
    zero = np.zeros(len(ACTION_NAMES), np.float32)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(zero)
    env.reset()
    while not env.step(zero)[2]:
        pass
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(zero)


def test_a_training_that_diverges_ends_the_episode() -> None:
    subject = problem()
    wild = replace(subject, settings=subject.settings.changed({"learning_rate": 1e12, "momentum": 0.0}), fixed={})
    env = made(problems=wild)
    env.reset(seed=0)
    over, total = False, 0.0
    while not over:
        _, reward, over, _, info = env.step(np.ones(len(ACTION_NAMES), np.float32))
        total += reward
    assert total == pytest.approx(WORST)
    assert "diverged" in info["steering"]["failed"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs a task or problems"),
        ({"task": "digits", "problems": problem()}, "needs a task or problems"),
        ({"task": "digts"}, "Did you mean 'digits'"),
        ({"task": "digits", "pattern": "n:m"}, "one sparsity alone"),
        ({"problems": []}, "needs problems"),
        ({"problems": problem(), "slices": 0}, "slices must be an integer >= 1"),
        ({"problems": problem(), "shaping": -1.0}, "shaping must be a number >= 0"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        gymnasium.make(STEER_ID, **given)


@pytest.mark.parametrize("options", [{"problem": 1}, {"seed": -1}, {"seeds": 1}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="options of"):
        made().reset(options=options)


def test_slices_pass_over_the_data_as_often_as_needed() -> None:
    assert len(list(Slices([1, 2, 3], 7))) == len(Slices([1, 2, 3], 7)) == 7
    assert list(Slices([1, 2, 3], 2)) == [1, 2]
    with pytest.raises(ConfigError, match="no batches"):
        list(Slices([], 2))


def test_a_stepped_training_ends_where_the_loop_ends() -> None:
    ends = []
    for stepped in (False, True):
        model, settings = conv_net(), TrainingSettings(epochs=3, max_steps=10)
        if stepped:
            training = SteppedTraining(model, random_batches(), LOSS, settings, seed=2)
            for _ in range(training.epochs):
                torch.manual_seed(0)  # what others draw meanwhile changes nothing
                training.advance()
            with pytest.raises(AutopruneError, match="all 3 epochs"):
                training.advance()
        else:
            train_(model, random_batches(), LOSS, settings, seed=2)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_a_task_is_steered_by_its_name() -> None:
    table = {"name": "digits", "model": {"name": "mlp", "widths": [16]}}
    env = gymnasium.make(STEER_ID, task=table, dense={"epochs": 1}, sparsity=0.7, slices=2, steps=1, budget="macs")
    result = episode(env)[-1]["steering"]
    assert result["problem"] == "digits"
    assert result["sparsity"] == pytest.approx(0.7, abs=0.15)
