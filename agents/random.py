"""Random search: uniform actions. The rival every learner must beat at equal evaluations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autoprune.agents.base import Agent, OnTrial, run_episode
from autoprune.envs.prune import PruneEnv


class RandomAgent(Agent):
    """Each episode draws its actions from its own seed, so that a resumed search needs no state."""

    def search(self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int) -> None:
        shape = env.action_space.shape
        for episode in range(done, episodes):
            draws = np.random.default_rng([seed, episode])
            on_trial(run_episode(env, lambda _, __, draws=draws: draws.uniform(-1, 1, shape).astype(np.float32)))
