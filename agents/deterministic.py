"""What TD3 and DDPG share: a deterministic actor that explores by noise of falling width, as AMC's did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

from autoprune.agents.base import check_number
from autoprune.agents.episodes import Episodes, actions_of
from autoprune.agents.sb3 import SB3Agent, check_arguments
from autoprune.errors import ConfigError


class DeterministicAgent(SB3Agent):
    """An actor-critic over the deterministic policy gradient, updated after every episode.

    Args:
        updates_per_step: gradient steps for each step of the environment.
        noise: standard deviation of the exploration noise, at the search's start and at its end.
    """

    algorithm: ClassVar[type[TD3]]

    def __init__(
        self,
        learning_rate: float = 1e-3,
        net: Sequence[int] = (128, 128),
        batch_size: int = 128,
        updates_per_step: int = 1,
        noise: Sequence[float] = (0.4, 0.1),
    ) -> None:
        super().__init__()
        if not isinstance(noise, (list, tuple)) or len(noise) != 2:
            raise ConfigError(f"agent {self.name!r}: noise must be two numbers, not {noise!r}.")
        counts = {"batch_size": batch_size, "updates_per_step": updates_per_step}
        check_arguments(self.name, net, learning_rate, counts)
        for at, value in zip(("noise", "noise at the end"), noise, strict=True):
            check_number(self.name, at, value, 1e-6, 10.0)
        self.learning_rate, self.net, self.batch_size = learning_rate, tuple(net), batch_size
        self.updates_per_step, self.noise = updates_per_step, (float(noise[0]), float(noise[1]))

    def build(self, env: Episodes, seed: int) -> BaseAlgorithm:
        size = actions_of(env)
        return self.algorithm(
            "MlpPolicy",
            env,
            learning_rate=self.learning_rate,
            buffer_size=100_000,
            learning_starts=0,
            batch_size=self.batch_size,
            gamma=env.gamma,
            train_freq=(1, "episode"),
            gradient_steps=self.updates_per_step * env.steps_per_episode,
            action_noise=NormalActionNoise(np.zeros(size), np.full(size, self.noise[0])),
            policy_kwargs={"net_arch": list(self.net)},
            seed=seed,
            device="cpu",
        )

    def on_episode(self, model: BaseAlgorithm, progress: float) -> None:
        assert isinstance(model, TD3)
        assert isinstance(model.action_noise, NormalActionNoise)
        start, end = self.noise
        # In place: the rollout about to start already holds this object.
        model.action_noise._sigma = np.full_like(model.action_noise._sigma, start * (end / start) ** progress)

    def arguments(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "net": list(self.net),
            "batch_size": self.batch_size,
            "updates_per_step": self.updates_per_step,
            "noise": list(self.noise),
        }
