"""The environment as Gymnasium's users meet it: found by its name, and clear where it is used wrongly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import SyncVectorEnv

from autoprune.agents.lockstep import Lockstep
from autoprune.envs import ENV_ID, PruneEnv
from autoprune.envs.family import FamilyEnv, task_targets_of
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.measurement import CachedEvaluate, Failure, Measurement
from autoprune.registry import Choice
from autoprune.testing import EvaluateBy, fake_problem

ACTIONS = (Choice("sparsity"), Choice("group_size"))


@pytest.mark.parametrize(
    "code",
    [
        "import gymnasium, autoprune; gymnasium.spec('autoprune/Prune-v0')",
        "import gymnasium, pytest\n"
        "with pytest.raises(Exception, match='needs a task or a problem'): "
        "gymnasium.make('autoprune:autoprune/Prune-v0', problem=None)",
        "import importlib, sys, autoprune; importlib.reload(autoprune); import gymnasium; "
        "gymnasium.spec('autoprune/Prune-v0'); importlib.reload(autoprune); "
        "module = gymnasium.envs.registration; assert module.__loader__ is module.__spec__.loader; "
        "assert not any('autoprune' in type(each).__module__ for each in [*sys.meta_path, module.__loader__])",
    ],
)
def test_an_import_is_enough_for_gymnasium_to_know_it(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_make_needs_a_problem() -> None:
    for given in ({}, {"problem": None}):
        with pytest.raises(ConfigError, match=r"needs a task or a problem .*, not None: gymnasium\.make"):
            gymnasium.make(ENV_ID, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gamma": math.nan}, "gamma"), ({"gamma": 0.0}, "gamma"), ({"gamma": "a"}, "gamma"),
        ({"shaping": -1.0}, "shaping"), ({"shaping": "a"}, "shaping"), ({"shaping": math.inf}, "shaping"),
        ({"start": "zz"}, "knapsack, uniform"), ({"start": None}, "knapsack, uniform"),
        ({"actions": ["sparsty"]}, "Did you mean 'sparsity'"), ({"actions": [3]}, "unknown action"),
        ({"actions": 3}, "actions"), ({"actions": "sparsity"}, "actions"),
    ],
    ids=repr,
)  # fmt: skip
def test_arguments_out_of_range_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PruneEnv(fake_problem(), **given)


def test_an_action_may_be_given_by_its_name() -> None:
    names: list[Any] = ["sparsity", {"name": "group_size"}]
    named = PruneEnv(fake_problem(), names)
    assert named.action_choices == ACTIONS


@pytest.mark.parametrize(
    "action",
    [
        np.zeros(3, np.float32), np.zeros((1, 2), np.float32), np.float32(0.0), np.array(["a", "b"]),
        np.array([None, 0.0]), np.array([True, False]), np.array([1j, 0]), np.array([math.nan, 0.0]),
        np.array([0.0, math.inf]), np.array([0.0, 1.5]), np.array([-7, 0]), [], None,
        np.full(2, -128, np.int8), np.full(2, np.iinfo(np.int64).min), [[0.0], [0.0, 1.0]],
        torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), [0.0, 10**400], {"a": 0.0},
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_action_is_refused_and_costs_no_step(action: Any) -> None:
    env = PruneEnv(fake_problem(), ACTIONS)
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    with pytest.raises(InvalidAction) as refused:
        env.step(action)
    assert isinstance(refused.value, AutopruneError)
    for _ in range(env.steps_per_episode - 2):
        assert not env.step(np.ones(2, np.float32))[2]
    assert env.step(np.ones(2, np.float32))[2]


@pytest.mark.parametrize(
    "action", [[0.5, -0.5], (1, -1), np.array([0.5, -0.5]), torch.tensor([0.5, -0.5]), np.array([1.0000001, 0.0]),
     torch.tensor([0.5, -0.5], requires_grad=True), np.array([-1, 1], np.int8)]
)  # fmt: skip
def test_numbers_in_another_form_are_an_action(action: Any) -> None:
    env, other = PruneEnv(fake_problem(), ACTIONS), PruneEnv(fake_problem(), ACTIONS)
    env.reset(seed=0)
    other.reset(seed=0)
    plain = action.tolist() if isinstance(action, torch.Tensor) else action
    same = np.clip(np.asarray(plain, np.float32), -1, 1)
    assert np.array_equal(env.step(action)[0], other.step(same)[0])


def test_a_step_needs_an_episode() -> None:
    env = PruneEnv(fake_problem(), ACTIONS)
    action = np.zeros(2, np.float32)
    with pytest.raises(ResetNeeded, match=r"call reset\(\) first"):
        env.step(action)
    env.reset()
    while not env.step(action)[2]:
        pass
    with pytest.raises(ResetNeeded) as refused:
        env.step(action)
    assert isinstance(refused.value, AutopruneError)
    env.reset()
    env.step(action)
    family = FamilyEnv(
        task_targets_of("one", fake_problem()), (Choice("coefficient"),), {"one": fake_problem().evaluate}
    )
    with pytest.raises(ResetNeeded):
        family.step(np.zeros(1, np.float32))


NO_SCORES: list[Any] = [None, "0.9", torch.zeros(2)]


@pytest.mark.parametrize(
    "measured",
    [Measurement(math.nan, 1.0, 2.0), Measurement(0.9, math.inf, 2.0), Measurement(0.9, 1.0, 0.0), Failure("diverged"),
     *(Measurement(score, 1.0, 2.0) for score in NO_SCORES), None, 0.5],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_is_no_reward(measured: Any, tmp_path: Path) -> None:
    problem = replace(fake_problem(), evaluate=EvaluateBy(lambda _: measured))
    kept = replace(problem, evaluate=CachedEvaluate(problem.evaluate, tmp_path / "evaluations.jsonl"))
    trials = []
    for each in (problem, kept, kept):
        env = PruneEnv(each, ACTIONS)
        env.reset(seed=0)
        over = False
        while not over:
            _, reward, over, _, info = env.step(np.zeros(2, np.float32))
            assert math.isfinite(reward)
        trials.append(info["trial"])
    together = Lockstep(PruneEnv(problem, ACTIONS), 2)
    together.reset()
    while True:
        _, rewards, done, infos = together.step(np.zeros((2, 2), np.float32))
        assert np.isfinite(rewards).all()
        if done.all():
            break
    trials += [info["trial"] for info in infos]
    assert all(trial == trials[0] for trial in trials)
    assert "failed" in trials[0]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, Fraction], ids=lambda kind: kind.__name__)
def test_figures_of_any_kind_of_number_are_json(kind: Any) -> None:
    measured = Measurement(kind(0.5), kind(1.0), kind(2.0))
    env = PruneEnv(replace(fake_problem(), evaluate=EvaluateBy(lambda _: measured)), ACTIONS)
    env.reset(seed=0)
    while not (step := env.step(np.zeros(2, np.float32)))[2]:
        pass
    assert json.loads(json.dumps(step[4]["trial"]))["score"] == 0.5


def test_vector_environments_are_many_of_one() -> None:
    envs = SyncVectorEnv([lambda: gymnasium.make(ENV_ID, problem=fake_problem(), actions=ACTIONS)] * 2)
    one = PruneEnv(fake_problem(), ACTIONS)
    observations, _ = envs.reset(seed=3, options={})
    single, _ = one.reset(seed=3)
    over = False
    while not over:
        assert all(np.array_equal(each, single) for each in observations)
        action = np.array([0.25, -0.5], np.float32)
        observations, rewards, ends, _, _ = envs.step(np.stack([action] * 2))
        single, reward, over, _, _ = one.step(action)
        assert rewards.tolist() == pytest.approx([reward] * 2)
        assert ends.tolist() == [over] * 2
    envs.close()


@pytest.mark.filterwarnings("ignore:.*render:UserWarning")
def test_there_is_nothing_to_render() -> None:
    env = gymnasium.make(ENV_ID, problem=fake_problem(), actions=ACTIONS)
    env.reset()
    assert env.metadata["render_modes"] == []
    with pytest.raises(NotImplementedError):
        env.unwrapped.render()
