"""Random restarts around the knapsack: SPDY's search for the layers' coefficients (Frantar and Alistarh 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from autoprune.agents.base import Agent, OnTrial
from autoprune.checks import check_numbers
from autoprune.envs.knapsack import weighed
from autoprune.envs.prune import PruneEnv


class RestartsAgent(Agent):
    """Draws every layer's coefficient from (0, 1], then changes a tenth of the best ones at a time.

    The first plan is the knapsack's own. Every episode draws from its own seed.

    Args:
        random_share: of the episodes, that draw all coefficients anew.
        changed_share: of the layers, that a later episode draws anew; one at least.
    """

    replays: ClassVar[bool] = True

    def __init__(self, random_share: float = 0.3, changed_share: float = 0.1) -> None:
        shares = {"random_share": random_share, "changed_share": changed_share}
        check_numbers("agent 'restarts'", shares, 0.0, 1.0)
        self.random_share, self.changed_share = random_share, changed_share

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        layers = len(env.problem.inventory.layers)
        best, best_reward = np.ones(layers), -np.inf
        for episode in range(episodes):
            draws = np.random.default_rng([seed, episode])
            if episode == 0:
                tried = np.ones(layers)
            elif episode < self.random_share * episodes:
                tried = 1.0 - draws.random(layers)
            else:
                tried = best.copy()
                count = max(1, round(self.changed_share * layers))
                tried[draws.choice(layers, count, replace=False)] = 1.0 - draws.random(count)
            trial = env.tried(weighed(env.problem, tried))
            if not trial.failed and trial.reward > best_reward:
                best, best_reward = tried, trial.reward
            on_trial(trial)
