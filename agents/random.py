"""Random search: uniform actions. The rival every learner must beat at equal evaluations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoprune.agents.base import Agent, OnTrial, run_episodes
from autoprune.envs.prune import PruneEnv


class RandomAgent(Agent):
    """Each episode draws its actions from its own seed, so that a resumed search needs no state."""

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        shape = env.action_space.shape
        actors = (partial(_draw, np.random.default_rng([seed, episode]), shape) for episode in range(done, episodes))
        for trial in run_episodes(env, actors):
            on_trial(trial)


def _draw(
    draws: np.random.Generator, shape: tuple[int, ...] | None, observation: NDArray[np.float32], step: int
) -> NDArray[np.float32]:
    return np.asarray(draws.uniform(-1.0, 1.0, shape), np.float32)
