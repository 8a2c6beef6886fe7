"""A saved policy as an agent: its mean action first, then (when there is a budget) tries around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoprune.agents.base import Actor, Agent, OnTrial, run_episode
from autoprune.agents.policy import Policy
from autoprune.envs.prune import PruneEnv
from autoprune.errors import ConfigError


class PretrainedAgent(Agent):
    """Applies a policy, trained on other models perhaps, to the problem at hand.

    Args:
        path: the policy's folder.
        noise: standard deviation added to the actions of every episode but the first.
    """

    def __init__(self, path: str, noise: float = 0.2) -> None:
        self.policy = Policy.load(Path(path))
        self.noise = noise

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        if env.action_choices != self.policy.actions:
            ours, theirs = (", ".join(map(str, choices)) for choices in (env.action_choices, self.policy.actions))
            raise ConfigError(f"the policy was trained for the actions {theirs}; this environment has {ours}.")
        for episode in range(done, episodes):
            width = self.noise if episode else 0.0
            on_trial(run_episode(env, self._around(np.random.default_rng([seed, episode]), width)))

    def _around(self, draws: np.random.Generator, width: float) -> Actor:
        def act(observation: NDArray[np.float32], step: int) -> NDArray[np.float32]:
            mean = self.policy.act(observation, step)
            return np.clip(mean + width * draws.standard_normal(mean.shape), -1.0, 1.0).astype(np.float32)

        return act
