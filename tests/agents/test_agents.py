"""Every agent in one harness: repeatable, resumable, saved without pickles; and learning pays."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoprune.agents import AGENTS
from autoprune.agents.base import Agent, run_episode
from autoprune.agents.baseline import CLOSE, uniform_at
from autoprune.agents.harness import SearchResult, search
from autoprune.agents.policy import Policy
from autoprune.agents.sb3 import SB3Agent
from autoprune.envs import PruneEnv
from autoprune.errors import ConfigError, FileError, MissingExtra
from autoprune.files import read_json, write_json
from autoprune.registry import Choice
from autoprune.testing import check_agent, fake_problem

TRAINABLE = [name for name in AGENTS if issubclass(AGENTS.get(name), SB3Agent)]
SEARCHING = [name for name in AGENTS if name != "policy"]  # 'policy' needs a file
HEAVY = ("tqc", "sac", "recurrent_ppo", "td3", "ddpg")  # networks of torch that learn for seconds
ONE_PLAN = ["greedy", "knapsack"]  # made without a search
DRAWING = [name for name in SEARCHING if name not in ("uniform", *ONE_PLAN)]


def build(name: str) -> Agent:
    small = {"net": [16]} if name in TRAINABLE else {}
    return AGENTS.create(Choice(name, small))


def rewards(result: SearchResult) -> list[float]:
    return [trial.reward for trial in result.trials]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in SEARCHING]
)
def test_every_agent_keeps_the_laws(name: str) -> None:
    check_agent(lambda: build(name))


@pytest.mark.parametrize("name", SEARCHING)
def test_the_budget_is_used_up_and_the_best_is_chosen(name: str) -> None:
    found = search(build(name), PruneEnv(fake_problem()), 7, seed=5)
    assert len(found.trials) == (1 if name in ONE_PLAN else 7)
    assert found.best.reward == max(rewards(found))


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_gives_another_search(name: str) -> None:
    assert rewards(search(build(name), PruneEnv(fake_problem()), 12, seed=0)) != rewards(
        search(build(name), PruneEnv(fake_problem()), 12, seed=1)
    )


def test_a_finished_search_is_not_run_again(tmp_path: Path) -> None:
    first = search(build("ppo"), PruneEnv(fake_problem()), 9, seed=2, directory=tmp_path)

    def fail(*_: object) -> None:
        pytest.fail("it is run")

    again = search(build("ppo"), PruneEnv(fake_problem()), 9, seed=2, directory=tmp_path, on_trial=fail)
    assert again.trials == first.trials


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    whole = search(build("random"), PruneEnv(fake_problem()), 5, seed=2, directory=tmp_path)
    log = tmp_path / "trials.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert search(build("random"), PruneEnv(fake_problem()), 5, seed=2, directory=tmp_path).trials == whole.trials


def test_a_search_leaves_the_callers_randomness_alone() -> None:
    states = []
    for run in (True, False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if run:
            search(build("ppo"), PruneEnv(fake_problem()), 2, seed=0)
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_policy_file_acts_like_the_agent_that_wrote_it(name: str, tmp_path: Path) -> None:
    agent, env = build(name), PruneEnv(fake_problem())
    search(agent, env, 4, seed=0)
    assert agent.save_policy(tmp_path, env)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]
    policy = Policy.load(tmp_path)
    assert isinstance(agent, SB3Agent)
    assert agent._model is not None
    observation, _ = env.reset()
    expected, _ = agent._model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(policy.act(observation, 0), expected)
    applied = search(AGENTS.create(Choice("policy", {"path": str(tmp_path)})), env, 1, seed=0)
    assert applied.trials[0] == run_episode(env, policy.act)


def test_a_policy_of_other_actions_is_refused(tmp_path: Path) -> None:
    agent, env = build("ppo"), PruneEnv(fake_problem())
    search(agent, env, 1, seed=0)
    agent.save_policy(tmp_path, env)
    with pytest.raises(ConfigError, match="trained for the actions"):
        search(
            AGENTS.create(Choice("policy", {"path": str(tmp_path)})),
            PruneEnv(fake_problem(), (Choice("sparsity"),)),
            1,
            seed=0,
        )


@pytest.mark.parametrize("damage", ["policy.json", "policy.safetensors", "missing", "version", "agent"])
def test_a_corrupt_policy_is_an_error(damage: str, tmp_path: Path) -> None:
    agent, env = build("ppo"), PruneEnv(fake_problem())
    search(agent, env, 1, seed=0)
    agent.save_policy(tmp_path, env)
    about = read_json(tmp_path / "policy.json", "the policy")
    if damage == "missing":
        (tmp_path / "policy.safetensors").unlink()
    elif damage == "version":
        write_json(tmp_path / "policy.json", {**about, "observation_version": 99})
    elif damage == "agent":
        write_json(tmp_path / "policy.json", {**about, "agent": {"name": "uniform", "args": {}}})
    else:
        (tmp_path / damage).write_bytes(b"nonsense")
    with pytest.raises(FileError):
        Policy.load(tmp_path)


HUGE = {
    "environments": ("episodes_per_update", 2**64),
    "many environments": ("episodes_per_update", 2**20),
    "a wide layer": ("net", [2**31]),
    "wider than its weights": ("net", [4096, 4096]),
    "layers": ("net", [16] * 1000),
    "no layers": ("net", {}),
    "no number": ("learning_rate", "high"),
    "a rate below zero": ("learning_rate", -1.0),
    "a deviation beyond floats": ("log_std", 1e3),
    "a negative count": ("minibatches", -1),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_policy_that_asks_for_much_is_refused_before_it_is_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, env = build("ppo"), PruneEnv(fake_problem())
    search(agent, env, 1, seed=0)
    agent.save_policy(tmp_path, env)
    about = read_json(tmp_path / "policy.json", "the policy")
    argument, value = HUGE[name]
    about["agent"]["args"][argument] = value
    write_json(tmp_path / "policy.json", about)
    monkeypatch.setattr(AGENTS.get("ppo"), "build", lambda *_, **__: pytest.fail("it is built"))
    with pytest.raises(FileError, match=r"policy\.json"):
        Policy.load(tmp_path)


OUT_OF_RANGE: dict[str, dict[str, Any]] = {
    "cma_es": {"spread": 0.0},
    "ddpg": {"noise": [0.4, 0.0]},
    "evopress": {"survivors": 17},
    "restarts": {"changed_share": 1.5},
    "sac": {"temperature": -0.1},
    "td3": {"learning_rate": float("nan")},
    "tpe": {"startup": 0},
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=next(iter(OUT_OF_RANGE[name]))):
        AGENTS.create(Choice(name, OUT_OF_RANGE[name]))


@pytest.mark.parametrize("length", [0, 10**9, 7, "51", None])
def test_a_policy_of_observations_of_another_length_is_refused(length: object, tmp_path: Path) -> None:
    agent, env = build("ppo"), PruneEnv(fake_problem())
    search(agent, env, 1, seed=0)
    agent.save_policy(tmp_path, env)
    about = read_json(tmp_path / "policy.json", "the policy")
    write_json(tmp_path / "policy.json", {**about, "observation_length": length})
    with pytest.raises(FileError, match="the policy is corrupt"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name not in ("ppo", "recurrent_ppo")])
@pytest.mark.parametrize("args", [{"batch_size": 2**40}, {"updates_per_step": 0}, {"net": [64, 0]}])
def test_arguments_of_learners_have_bounds(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*{next(iter(args))}"):
        AGENTS.create(Choice(name, args))


def test_a_checkpoint_of_another_agent_is_an_error(tmp_path: Path) -> None:
    search(build("ppo"), PruneEnv(fake_problem()), 12, seed=0, directory=tmp_path)
    with pytest.raises(FileError, match="does not fit"):
        search(build("sac"), PruneEnv(fake_problem()), 14, seed=0, directory=tmp_path)


def test_tpe_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"pip install .autoprune\[rivals\]"):
        AGENTS.create(Choice("tpe"))


def test_tpe_models_what_it_has_seen() -> None:
    problem = fake_problem()
    tpe, chance = (search(AGENTS.create(Choice(name)), PruneEnv(problem), 60, seed=0) for name in ("tpe", "random"))
    late = [float(np.mean(rewards(result)[30:])) for result in (tpe, chance)]
    assert late[0] > late[1]


def test_learning_beats_random_search_and_the_uniform_rule() -> None:
    problem = fake_problem()
    learned = search(AGENTS.create(Choice("ppo")), PruneEnv(problem), 150, seed=0)
    chance = search(build("random"), PruneEnv(problem), 150, seed=0)
    uniform = uniform_at(PruneEnv(problem), learned.best.measurement.speedup)
    assert uniform is not None
    assert learned.best.reward > max(chance.best.reward, uniform.reward)


def test_the_uniform_rival_is_as_fast_as_the_agent() -> None:
    rival = uniform_at(PruneEnv(fake_problem()), 3.5)
    assert rival is not None
    assert rival.measurement.speedup >= 3.5 * (1 - CLOSE)
    pruned = {layer.sparsity for layer in rival.plan.layers.values()} - {0.0}
    assert len(pruned) == 1


def test_no_rival_where_none_is_fast_enough() -> None:
    assert uniform_at(PruneEnv(fake_problem()), 900.0) is None
