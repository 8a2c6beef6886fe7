"""Uniform: every layer alike, at the target; the rule of thumb of most users, with its few settings tried."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from autoprune.agents.base import Agent, OnTrial, always, run_episodes
from autoprune.envs.prune import PruneEnv


class UniformAgent(Agent):
    """Walks the grid of the components' anchors (criteria x group sizes x ...) and stops at its end."""

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        env = env.alike()
        grid = itertools.product(*(component.anchors() for component in env.actions.components))
        actions = (np.array(units, dtype=np.float32) for units in itertools.islice(grid, done, episodes))
        for trial in run_episodes(env, map(always, actions)):
            on_trial(trial)
