"""DDPG (Lillicrap et al. 2016): the agent of AMC (He et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

from stable_baselines3 import DDPG, TD3

from autoprune.agents.deterministic import DeterministicAgent


class DDPGAgent(DeterministicAgent):
    """Deterministic policy gradient, one critic."""

    name = "ddpg"
    algorithm: ClassVar[type[TD3]] = DDPG
