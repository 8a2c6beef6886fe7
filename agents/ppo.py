"""PPO (Schulman et al. 2017): on-policy, updated after every few whole episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from autoprune.agents.episodes import Episodes
from autoprune.agents.sb3 import SB3Agent


class PPOAgent(SB3Agent):
    """Gaussian policy that starts narrow around the uniform plan.

    Args:
        episodes_per_update: whole episodes in a rollout.
        minibatches: parts of a rollout, each an update's batch.
        log_std: log of the initial standard deviation of the actions.
    """

    name = "ppo"
    on_policy = True

    def __init__(
        self,
        learning_rate: float = 1e-3,
        net: Sequence[int] = (64, 64),
        episodes_per_update: int = 8,
        epochs: int = 10,
        minibatches: int = 2,
        log_std: float = -1.0,
    ) -> None:
        super().__init__()
        self.learning_rate, self.net = learning_rate, tuple(net)
        self.episodes_per_update, self.epochs, self.log_std = episodes_per_update, epochs, log_std
        self.minibatches = minibatches

    def build(self, env: Episodes, seed: int) -> BaseAlgorithm:
        steps = self.episodes_per_update * env.steps_per_episode
        rollout = steps * (env.num_envs if isinstance(env, VecEnv) else 1)
        return PPO(
            "MlpPolicy",
            env,
            learning_rate=self.learning_rate,
            n_steps=steps,
            batch_size=max(2, rollout // self.minibatches),
            n_epochs=self.epochs,
            gamma=env.gamma,
            gae_lambda=0.95,
            policy_kwargs={"net_arch": list(self.net), "log_std_init": self.log_std},
            seed=seed,
            device="cpu",
        )

    def arguments(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "net": list(self.net),
            "episodes_per_update": self.episodes_per_update,
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "log_std": self.log_std,
        }
