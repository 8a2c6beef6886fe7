"""TD3 (Fujimoto et al. 2018): twin critics and delayed updates of a deterministic actor."""

from __future__ import annotations

from typing import ClassVar

from stable_baselines3 import TD3

from autoprune.agents.deterministic import DeterministicAgent


class TD3Agent(DeterministicAgent):
    """Deterministic policy gradient, twin critics."""

    name = "td3"
    algorithm: ClassVar[type[TD3]] = TD3
