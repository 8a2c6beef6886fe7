"""Learning to steer: repeatable, resumed as if it had never stopped, refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autoprune.agents.ppo import PPOAgent
from autoprune.agents.steering import SteeringLearner, SteeringUpdate, advantage_of
from autoprune.envs.steer import SteerEnv, SteerProblem
from autoprune.errors import AutopruneError, ConfigError
from autoprune.pipeline import steering
from autoprune.pipeline.steer_problems import LEAST, MOST, at_sparsity, at_stake
from autoprune.pipeline.steering import SteeringConfig, SteeringLearning, SteeringSection, SteeringTraining
from autoprune.registry import Choice
from autoprune.tasks.family import Member
from autoprune.tasks.steering import draw_steering_members, held_out_steering_members
from autoprune.training.steering_policy import SteeringPolicy
from tests.envs.test_steer import problem

PPO = {"net": [8], "episodes_per_update": 1, "minibatches": 2}


def learner(shared: SteerProblem) -> SteeringLearner:
    envs = [SteerEnv(shared, slices=3, steps=1, seeds=2) for _ in range(2)]
    return SteeringLearner(PPOAgent(net=[8], episodes_per_update=1), envs, seed=1)


def same(one: SteeringPolicy, other: SteeringPolicy) -> bool:
    pairs = zip((*one.weights, *one.biases), (*other.weights, *other.biases), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_killed_learning_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    shared = problem()
    whole, seen = learner(shared), list[SteeringUpdate]()
    before = whole.policy
    whole.learn(7, tmp_path / "whole", seen.append)
    assert [update.index for update in seen] == list(range(7))
    assert all(len(update.advantages) == 2 for update in seen)
    assert not same(before, whole.policy)

    def stop(update: SteeringUpdate) -> None:
        if update.index == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner(shared).learn(7, tmp_path / "killed", stop)
    torch.manual_seed(5)  # what others drew changes nothing
    again, rest = learner(shared), list[SteeringUpdate]()
    again.learn(7, tmp_path / "killed", rest.append)
    assert rest == seen[5:]
    assert same(again.policy, whole.policy)


def test_the_policy_that_is_written_acts_as_the_one_that_learns() -> None:
    made = learner(problem())
    env, policy = SteerEnv(problem(), slices=3, steps=1), made.policy
    observation, _ = env.reset(seed=0)
    wanted, _ = made._model.predict(observation, deterministic=True)
    assert policy([float(each) for each in observation]) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert advantage_of(policy, env, 0, 1) == advantage_of(policy, env, 0, 1)


def config(**learning: int) -> SteeringConfig:
    return SteeringConfig(
        steering=SteeringSection(tasks=5, slices=4, steps=1, seeds=1),
        agent=Choice("ppo", PPO),
        learning=SteeringLearning(**{"updates": 2, "envs": 1, "judge_every": 1, "judged_seeds": 1, **learning}),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that take no time."""
    monkeypatch.setattr(steering, "problem_at_stake", lambda _, member, __: problem(member.name))


@pytest.mark.usefixtures("quick")
def test_training_keeps_the_policy_that_the_choosing_tasks_like_best(tmp_path: Path) -> None:
    best = SteeringTraining(config(), tmp_path).train()
    lines = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1]
    assert best.choosing == max(line["choosing"] for line in lines)
    assert SteeringPolicy.load(tmp_path / "policy").slices == 4
    assert SteeringTraining(config(), tmp_path).train() == best
    with pytest.raises(ConfigError, match=r"learning\.updates"):
        SteeringTraining(config(updates=3), tmp_path)


def test_what_cannot_be_learned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="by the agent 'ppo', not 'sac'"):
        SteeringTraining(config().model_copy(update={"agent": Choice("sac")}), tmp_path / "sac").train()
    monkeypatch.setattr(steering, "problem_at_stake", lambda *_: None)
    with pytest.raises(AutopruneError, match="draw more"):
        SteeringTraining(config(), tmp_path / "none").train()


def test_a_family_is_drawn_alike_and_never_holds_what_it_is_judged_by() -> None:
    assert draw_steering_members(8, 3) == draw_steering_members(8, 3) != draw_steering_members(8, 4)

    def builds(members: tuple[Member, ...]) -> set[str]:
        return {member.task.args["model"]["name"] for member in members}

    assert len(builds(draw_steering_members(8, 0))) == 3
    assert not builds(draw_steering_members(40, 0)) & builds(held_out_steering_members())


def test_a_target_is_looked_for_where_something_is_at_stake(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = problem()

    def loses(slope: float) -> None:
        def scores(self: SteerProblem, slices: int, steps: int, seed: int) -> dict[str, float]:
            sparsity = self.plan.layers["0"].sparsity
            return {"lamp": self.dense_score - slope * sparsity**8, "erk": -1.0}

        monkeypatch.setattr(SteerProblem, "fixed_scores", scores)

    loses(0.05)
    found = at_stake(subject, 3, 1)
    assert found is not None
    assert LEAST <= found[1] <= MOST
    assert found[1] == pytest.approx(0.05 * found[0] ** 8)
    loses(0.001)
    assert at_stake(subject, 3, 1) is None
    with pytest.raises(ConfigError, match="sparsity"):
        at_sparsity(subject, 1.0)
