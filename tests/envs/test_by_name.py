"""The environment of a task by its name: made once, the same wherever it is made, clear where it is asked wrongly."""

from __future__ import annotations

import gc
import inspect
import pickle
import re
import tomllib
from pathlib import Path
from shutil import copyfile
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from autoprune.config import parse_config
from autoprune.envs import ENV_ID, PruneEnv
from autoprune.envs.actions import ACTIONS
from autoprune.envs.observation import NAMES
from autoprune.errors import ConfigError, FileError, InfeasibleTarget
from autoprune.pipeline import environment
from autoprune.pipeline.environment import prune_env
from autoprune.pipeline.run import Run
from autoprune.target import FIGURES
from autoprune.testing import fake_problem, save_fake_table
from tests.helpers import SMALL_TOML

ROOT = Path(__file__).resolve().parents[2]
SMALL = tomllib.loads(SMALL_TOML)
TARGET = {"target_speedup": 1.5, "target_over": "eager"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keywords of an environment whose latency table is there already, and does not depend on the clock."""
    directory, env = tmp_path_factory.mktemp("environment"), {"actions": ["sparsity"], "timing": "table"}
    run = Run(parse_config({**SMALL, "target": {"speedup": 1.5, "over": "eager"}, "env": env}, "asked"), directory)
    save_fake_table(run)
    run.lock.close()
    return {"task": SMALL, **TARGET, "actions": ["sparsity"], "directory": directory}


@pytest.fixture(scope="module")
def env(asked: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(ENV_ID, **asked)


def episode(env: gymnasium.Env[Any, Any], seed: int) -> list[Any]:
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    seen, over = [observation.tolist()], False
    while not over:
        observation, reward, over, truncated, info = env.step(env.action_space.sample())
        assert not truncated
        seen += [observation.tolist(), reward, info]
    return seen


def test_those_that_are_asked_for_alike_share_a_problem(env: gymnasium.Env[Any, Any], asked: dict[str, Any]) -> None:
    assert isinstance(env.unwrapped, PruneEnv)
    assert prune_env(**asked).problem is env.unwrapped.problem, "what one has evaluated is free for the other"
    other = prune_env(**asked, shaping=0.0)
    assert (other.shaping, other.problem) == (0.0, env.unwrapped.problem), "how it is shaped is no part of it"
    assert env.unwrapped.problem.target.to_json() == {"speedup": 1.5, "over": "eager"}
    with pytest.raises(ConfigError, match="another config"):
        prune_env(**{**asked, "target_speedup": 2.0})


@pytest.mark.slow
def test_what_is_made_is_said_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"task": {**SMALL, "env": {"min_saving": 0.0}}, "target_sparsity": 0.5}
    env = prune_env(**asked)
    said = capsys.readouterr().err
    for stage in ("prunable layers", "latency table", "sensitivity"):
        assert stage in said
    table = env.problem.table
    del env
    gc.collect()
    assert prune_env(**asked).problem.table == table
    assert capsys.readouterr().err == ""


def test_an_episode_is_a_function_of_its_actions(env: gymnasium.Env[Any, Any], asked: dict[str, Any]) -> None:
    assert episode(env, 3) == episode(env, 3)
    assert episode(gymnasium.make(ENV_ID, **asked), 3) == episode(env, 3)


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_both_checkers_pass(env: gymnasium.Env[Any, Any]) -> None:
    check_env(env.unwrapped, skip_render_check=True)
    check_env_sb3(env.unwrapped)


def test_the_registered_spec_makes_the_same(env: gymnasium.Env[Any, Any], asked: dict[str, Any]) -> None:
    assert env.spec is not None
    assert env.spec.kwargs == asked
    assert env.spec.max_episode_steps is None, "an episode ends of itself, after a step a layer"
    assert episode(gymnasium.make(env.spec), 1) == episode(env, 1)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_a_pickle_survives(env: gymnasium.Env[Any, Any], pickler: Any) -> None:
    assert episode(pickle.loads(pickler.dumps(env.unwrapped)), 2) == episode(env, 2)  # noqa: S301 - made here


def test_vectors_of_it_are_made_by_name(env: gymnasium.Env[Any, Any], asked: dict[str, Any]) -> None:
    envs = gymnasium.make_vec(ENV_ID, num_envs=2, **asked)
    single, _ = env.reset(seed=0)
    observations: Any = envs.reset(seed=0)[0]
    assert np.array_equal(observations, np.stack([single] * 2))
    envs.close()


def test_plain_stable_baselines_learns_in_it(env: gymnasium.Env[Any, Any]) -> None:
    assert isinstance(env.unwrapped, PruneEnv)
    steps = 2 * env.unwrapped.steps_per_episode
    assert PPO("MlpPolicy", env, n_steps=steps, batch_size=steps, device="cpu").learn(steps).num_timesteps == steps


@pytest.mark.slow
def test_processes_each_make_their_own(env: gymnasium.Env[Any, Any], asked: dict[str, Any]) -> None:
    envs = make_vec_env(f"autoprune:{ENV_ID}", 2, env_kwargs=asked, vec_env_cls=SubprocVecEnv)
    observations: Any = envs.reset()
    assert np.array_equal(observations, np.stack([env.reset()[0]] * 2))
    envs.close()


def test_every_number_has_a_name(env: gymnasium.Env[Any, Any]) -> None:
    plain = env.unwrapped
    assert isinstance(plain, PruneEnv)
    assert plain.action_names == ("sparsity",)
    assert plain.observation_names == (*NAMES, "previous sparsity")
    assert plain.action_space.shape == (len(plain.action_names),)
    assert plain.observation_space.shape == (len(plain.observation_names),)


def test_the_guide_explains_every_number() -> None:
    page = (ROOT / "docs" / "guide" / "environment.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)))
    of_anchors = {re.sub(r" at 0\.\d+$", " at", name) for name in NAMES}
    assert of_anchors | set(ACTIONS) <= explained
    keywords = set(inspect.signature(prune_env).parameters) - {f"target_{name}" for name in FIGURES}
    assert keywords <= explained


def test_every_figure_of_a_target_is_a_keyword() -> None:
    keywords = inspect.signature(prune_env).parameters
    assert {f"target_{name}" for name in FIGURES} <= set(keywords)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs a task or a problem"),
        ({"task": "digts"}, "Did you mean 'digits'"),
        ({"task": 3}, "task is the name"),
        ({"task": SMALL, "target_speedup": 0.5}, "above 1"),
        ({"task": SMALL, "target_speedup": 2.0, "target_over": "eagre"}, "Did you mean 'eager'"),
        ({"task": SMALL, "actions": "sparsity"}, "list of names"),
        ({"task": SMALL, "actions": ["sparsty"]}, "Did you mean 'sparsity'"),
        ({"task": SMALL, "actions": ["precision"]}, "needs precision 'planned'"),
        ({"task": SMALL, "timing": "clock"}, "timing"),
        ({"task": SMALL, "gamma": 2.0}, "gamma"),
        ({"task": SMALL, "shaping": float("nan")}, "shaping is a number from 0 up, not nan"),
        ({"task": SMALL, "start": "unifrom"}, "Did you mean 'uniform'"),
        ({"task": SMALL, "curves": "yes"}, "curves is true or false"),
        ({"task": {**SMALL, "tagret": {}}}, "Did you mean 'target'"),
        ({"task": SMALL, "problem": fake_problem()}, "not both"),
        ({"problem": fake_problem(), "target_speedup": 2.0}, "target_speedup cannot be given with a problem"),
        ({"problem": fake_problem(), "timing": "table"}, "timing cannot be given with a problem"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_made", lambda *_: pytest.fail("it is made first"))
    with pytest.raises(ConfigError, match=said):
        prune_env(**given)


def test_the_directory_may_be_the_one_of_the_process(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(asked["directory"])
    assert prune_env(**{**asked, "directory": "."}).problem is prune_env(**asked).problem


def test_a_config_that_is_not_there_is_said() -> None:
    with pytest.raises(FileError, match="not found"):
        prune_env(task="nowhere/config.toml")


def test_a_target_out_of_reach_leaves_the_directory_to_another(asked: dict[str, Any], tmp_path: Path) -> None:
    far = {**asked, "directory": tmp_path}
    copyfile(asked["directory"] / "latency.json", tmp_path / "latency.json")
    with pytest.raises(InfeasibleTarget, match="900x"):
        prune_env(**{**far, "target_speedup": 900.0})
    assert prune_env(**far).problem.required_speedup == 1.5
