"""SAC (Haarnoja et al. 2018): off-policy, entropy-regularised, updated after every episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from autoprune.agents.episodes import Episodes
from autoprune.agents.sb3 import OffPolicyAgent
from autoprune.checks import check_numbers


class SACAgent(OffPolicyAgent):
    """Squashed Gaussian policy with a learned temperature.

    Args:
        updates_per_step: gradient steps for each step of the environment.
        temperature: initial entropy coefficient; it adapts.
    """

    name = "sac"

    def __init__(
        self,
        learning_rate: float = 1e-3,
        net: Sequence[int] = (128, 128),
        batch_size: int = 128,
        updates_per_step: int = 1,
        temperature: float = 0.05,
    ) -> None:
        super().__init__(learning_rate, net, batch_size, updates_per_step)
        check_numbers(f"agent {self.name!r}", {"temperature": temperature}, 1e-6, 100.0)
        self.temperature = temperature

    def algorithm(self) -> type[SAC]:
        """The class that is built."""
        return SAC

    def build(self, env: Episodes, seed: int) -> BaseAlgorithm:
        return self.algorithm()(
            "MlpPolicy",
            env,
            ent_coef=f"auto_{self.temperature}",
            policy_kwargs={"net_arch": list(self.net), "log_std_init": -1.0},
            **self.settings(env, seed),
        )

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "temperature": self.temperature}
