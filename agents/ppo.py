"""PPO (Schulman et al. 2017): on-policy, updated after every few whole episodes, which are played in lockstep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from autoprune.agents.episodes import Episodes
from autoprune.agents.lockstep import Lockstep
from autoprune.agents.sb3 import SB3Agent, check_arguments
from autoprune.checks import check_numbers


class PPOAgent(SB3Agent):
    """Gaussian policy that starts narrow around the uniform plan.

    Args:
        episodes_per_update: whole episodes in a rollout; their plans are evaluated at once.
        minibatches: parts of a rollout, each an update's batch.
        log_std: log of the initial standard deviation of the actions.
    """

    name = "ppo"
    on_policy = True
    policy: ClassVar[str] = "MlpPolicy"  # stable-baselines3's name of it
    network: ClassVar[Mapping[str, Any]] = {}  # more of its arguments

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
        counts = {"episodes_per_update": episodes_per_update, "epochs": epochs, "minibatches": minibatches}
        check_arguments(self.name, net, learning_rate, counts)
        check_numbers(f"agent {self.name!r}", {"log_std": log_std}, -10.0, 3.0)
        self.learning_rate, self.net = learning_rate, tuple(net)
        self.episodes_per_update, self.epochs, self.log_std = episodes_per_update, epochs, log_std
        self.minibatches = minibatches

    def algorithm(self) -> type[PPO]:
        """The class that is built."""
        return PPO

    def build(self, env: Episodes, seed: int) -> BaseAlgorithm:
        envs: VecEnv
        if isinstance(env, VecEnv):
            envs, steps = env, self.episodes_per_update * env.steps_per_episode
        else:
            # So many copies whatever there is to evaluate them: the workers change no trial.
            envs, steps = Lockstep(env, self.episodes_per_update), env.steps_per_episode
        return self.algorithm()(
            self.policy,
            envs,
            learning_rate=self.learning_rate,
            n_steps=steps,
            batch_size=max(2, steps * envs.num_envs // self.minibatches),
            n_epochs=self.epochs,
            gamma=env.gamma,
            gae_lambda=0.95,
            policy_kwargs={"net_arch": list(self.net), "log_std_init": self.log_std, **self.network},
            seed=seed,
            device="cpu",
        )

    def on_search(self, model: BaseAlgorithm, episodes: int) -> None:
        assert isinstance(model.env, Lockstep)  # a family is learned update by update, not searched
        model.env.remaining = episodes

    def arguments(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "net": list(self.net),
            "episodes_per_update": self.episodes_per_update,
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "log_std": self.log_std,
        }
