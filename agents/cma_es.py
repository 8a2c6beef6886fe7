"""CMA-ES (Hansen and Ostermeier 2001) from the zero action on."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from autoprune.agents.base import Agent, OnTrial
from autoprune.agents.evolution import evolve
from autoprune.checks import check_numbers
from autoprune.envs.prune import PruneEnv


class CmaEsAgent(Agent):
    """Starts at the plan that the zero action makes.

    Args:
        spread: standard deviation of the first generation's actions.
    """

    replays: ClassVar[bool] = True

    def __init__(self, spread: float = 0.4) -> None:
        check_numbers("agent 'cma_es'", {"spread": spread}, 1e-3, 10.0)
        self.spread = spread

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        start = np.zeros((env.steps_per_episode, len(env.actions.components)))
        evolve(env, start, self.spread, episodes, seed, on_trial)
