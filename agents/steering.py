"""Learning to steer trainings, update by update, so that a killed learning goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor, nn

from autoprune.agents.checkpoint import checkpoint_episodes, load_checkpoint_, save_checkpoint
from autoprune.agents.episodes import SteerEnvs
from autoprune.agents.ppo import PPOAgent
from autoprune.envs.steer import SteerEnv
from autoprune.randomness import own_randomness
from autoprune.training.steering_policy import SteeringPolicy

CHECKPOINT_EVERY = 5  # updates


@dataclass(frozen=True)
class SteeringUpdate:
    """What one update saw.

    Attributes:
        index: counted from 0.
        advantages: of the episodes that ended in it, over the best fixed schedule; see `envs.steer`.
    """

    index: int
    advantages: tuple[float, ...]


class SteeringLearner:
    """PPO over steered trainings.

    Args:
        agent: its settings.
        envs: episodes side by side; they may share problems.
        seed: of everything that is drawn.
    """

    def __init__(self, agent: PPOAgent, envs: Sequence[SteerEnv], seed: int) -> None:
        self._agent, self._seed, self._slices = agent, seed, envs[0].slices
        self._envs = SteerEnvs(envs)
        with own_randomness():
            self._model = agent.build(self._envs, seed)
        self._model.set_logger(Logger(folder=None, output_formats=[]))

    def learn(self, updates: int, directory: Path, on_update: Callable[[SteeringUpdate], None]) -> None:
        """Runs what is missing of `updates`; every one starts with fresh episodes, drawn from its own seed."""
        done = checkpoint_episodes(directory)
        with own_randomness():
            if done:
                load_checkpoint_(directory, self._model)
            for index in range(done, updates):
                on_update(self._update(index))
                if (index + 1) % CHECKPOINT_EVERY == 0 or index + 1 == updates:
                    save_checkpoint(directory, self._model, index + 1)

    def _update(self, index: int) -> SteeringUpdate:
        # What stable-baselines3 draws from are the process's generators, which another process finds in another state.
        drawn = int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0]) >> 1
        set_random_seed(drawn)
        self._envs.seed(drawn)
        self._model._last_obs = None  # what makes stable-baselines3 begin new episodes
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
