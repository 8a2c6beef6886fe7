"""Learning to steer trainings, update by update, so that a killed learning goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from autoprune.agents.episodes import SteerEnvs
from autoprune.agents.ppo import PPOAgent
from autoprune.agents.updates import UpdateLearner
from autoprune.envs.steer import SteerEnv
from autoprune.randomness import own_randomness
from autoprune.training.steering_policy import SteeringPolicy


@dataclass(frozen=True)
class SteeringUpdate:
    """What one update saw.

    Attributes:
        index: counted from 0.
        advantages: of the episodes that ended in it, over the best fixed schedule; see `envs.steer`.
    """

    index: int
    advantages: tuple[float, ...]


class SteeringLearner(UpdateLearner[SteeringUpdate]):
    """PPO over steered trainings.

    Args:
        agent: its settings.
        envs: episodes side by side; they may share problems.
        seed: of everything that is drawn.
    """

    checkpoint_every = 5

    def __init__(self, agent: PPOAgent, envs: Sequence[SteerEnv], seed: int) -> None:
        self._agent, self._seed, self._slices = agent, seed, envs[0].slices
        self._envs = SteerEnvs(envs)
        with own_randomness():
            self._model = agent.build(self._envs, seed)
        self._model.set_logger(Logger(folder=None, output_formats=[]))

    def _update(self, index: int, updates: int) -> SteeringUpdate:
        seed = self._drawn(index) >> 1  # an environment's is so many above it
        self._begin(seed)
        self._envs.seed(seed)
        seen = _Seen()
        self._model.learn(1, callback=seen, reset_num_timesteps=False)
        return SteeringUpdate(index, tuple(seen.advantages))

    @property
    def policy(self) -> SteeringPolicy:
        """The policy as it is now; it stays as it is while learning goes on."""
        network = self._model.policy
        assert isinstance(network, ActorCriticPolicy)
        layers = [*network.mlp_extractor.policy_net, network.action_net]
        linear = [each for each in layers if isinstance(each, nn.Linear)]

        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().clone()

        weights, biases = ([copied(each.weight) for each in linear], [copied(each.bias) for each in linear])
        return SteeringPolicy(tuple(weights), tuple(biases), self._slices)


class _Seen(BaseCallback):
    """Collects what episodes report."""

    def __init__(self) -> None:
        super().__init__()
        self.advantages: list[float] = []

    def _on_step(self) -> bool:
        infos: Sequence[dict[str, Any]] = self.locals["infos"]
        self.advantages += [float(info["steering"]["advantage"]) for info in infos if "steering" in info]
        return True


def advantage_of(policy: SteeringPolicy, env: SteerEnv, problem: int, seed: int) -> float:
    """What a policy's training is worth more than the best fixed schedule's, in units of the problem's stake."""
    observation, _ = env.reset(options={"problem": problem, "seed": seed})
    while True:
        action = np.array(policy([float(each) for each in observation]), np.float32)
        observation, _, over, _, info = env.step(action)
        if over:
            return float(info["steering"]["advantage"])
