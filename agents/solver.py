"""Rules that need no evaluation to make their one plan: greedy by sensitivity a microsecond, and the knapsack."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from autoprune.agents.base import Agent, OnTrial
from autoprune.envs.prune import PruneEnv


class SolverAgent(Agent):
    """Tries the plan that a solver makes of the latency table and the sensitivity curves, and stops."""

    greedily: ClassVar[bool]

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        if done == 0:
            on_trial(env.tried(env.solved(self.greedily)))


class GreedyAgent(SolverAgent):
    """Prunes one layer a step further, where the least loss saves a microsecond, until the target is met."""

    greedily = True


class KnapsackAgent(SolverAgent):
    """Dynamic programming over the layers' curves (HALP, Shen et al. 2022)."""

    greedily = False
