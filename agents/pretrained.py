"""A saved policy as an agent: its mean action first, then (when there is a budget) CMA-ES from there."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autoprune.agents.base import Agent, OnTrial, run_episode
from autoprune.agents.evolution import evolve
from autoprune.agents.policy import SHIPPED, Policy
from autoprune.envs.prune import PruneEnv
from autoprune.errors import ConfigError


class PretrainedAgent(Agent):
    """Applies a policy, trained on other models perhaps, to the problem at hand.

    The first episode is the policy's own plan, and the best of all is kept: more episodes never end below it.

    Args:
        path: the policy's folder; the policy that comes with autoprune when left out.
        spread: standard deviation of the first generation around the policy's actions.
    """

    replays: ClassVar[bool] = True

    def __init__(self, path: str | None = None, spread: float = 0.25) -> None:
        self.policy = Policy.load(Path(path) if path is not None else SHIPPED)
        self.spread = spread

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        if env.action_choices != self.policy.actions:
            ours, theirs = (", ".join(map(str, choices)) for choices in (env.action_choices, self.policy.actions))
            raise ConfigError(f"the policy was trained for the actions {theirs}; this environment has {ours}.")
        taken: list[NDArray[np.float32]] = []

        def act(observation: NDArray[np.float32], step: int) -> NDArray[np.float32]:
            taken.append(self.policy.act(observation, step))
            return taken[-1]

        first = run_episode(env, act)
        if episodes == 1:
            on_trial(first)
        else:
            evolve(env, np.clip(np.array(taken, np.float64), -1.0, 1.0), self.spread, episodes, seed, on_trial)
