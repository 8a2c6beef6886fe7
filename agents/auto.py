"""The default: what does best from the rules' plans on, at any budget."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from autoprune.agents.base import Agent, OnTrial
from autoprune.agents.cma_es import CmaEsAgent
from autoprune.agents.pretrained import PretrainedAgent
from autoprune.envs.prune import PruneEnv


class AutoAgent(Agent):
    """The bundled policy, refined, where the actions are those it has learned; else CMA-ES.

    Both are ahead of the learners at the budgets that a single model is worth: `benchmarks/results/agents.md`.
    """

    replays: ClassVar[bool] = True

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        bundled = PretrainedAgent()
        agent: Agent = bundled if env.action_choices == bundled.policy.actions else CmaEsAgent()
        agent.search(env, episodes, seed, on_trial, directory, done)
