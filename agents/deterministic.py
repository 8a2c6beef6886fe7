"""What TD3 and DDPG share: a deterministic actor that explores by noise of falling width, as AMC's did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

from autoprune.agents.episodes import Episodes, actions_of
from autoprune.agents.sb3 import OffPolicyAgent
from autoprune.checks import check_numbers
from autoprune.errors import ConfigError


class DeterministicAgent(OffPolicyAgent):
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
        if not isinstance(noise, (list, tuple)) or len(noise) != 2:
            raise ConfigError(f"agent {self.name!r}: noise must be two numbers, not {noise!r}.")
        super().__init__(learning_rate, net, batch_size, updates_per_step)
        check_numbers(f"agent {self.name!r}", {"noise": noise[0], "noise at the end": noise[1]}, 1e-6, 10.0)
        self.noise = (float(noise[0]), float(noise[1]))

    def build(self, env: Episodes, seed: int) -> BaseAlgorithm:
        size = actions_of(env)
        return self.algorithm(
            "MlpPolicy",
            env,
            action_noise=NormalActionNoise(np.zeros(size), np.full(size, self.noise[0])),
            policy_kwargs={"net_arch": list(self.net)},
            **self.settings(env, seed),
        )

    def on_episode(self, model: BaseAlgorithm, progress: float) -> None:
        assert isinstance(model, TD3)
        assert isinstance(model.action_noise, NormalActionNoise)
        start, end = self.noise
        # In place: the rollout about to start already holds this object.
        model.action_noise._sigma = np.full_like(model.action_noise._sigma, start * (end / start) ** progress)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "noise": list(self.noise)}
