"""Learning over a family of tasks, update by update, so that a killed training goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from autoprune.agents.base import Actor, run_episode
from autoprune.agents.episodes import FamilyEnvs
from autoprune.agents.policy_file import MeanAction, save_policy
from autoprune.agents.sb3 import SB3Agent
from autoprune.agents.updates import UpdateLearner
from autoprune.envs.family import FamilyEnv, advantage
from autoprune.envs.prune import PruneEnv
from autoprune.randomness import own_randomness
from autoprune.registry import Choice


@dataclass(frozen=True)
class Update:
    """What one update saw.

    Attributes:
        index: counted from 0.
        advantages: of the episodes that ended in it; see `envs.family`.
        surrogate_errors: of those that were measured: how far off the surrogate's score was.
    """

    index: int
    advantages: tuple[float, ...]
    surrogate_errors: tuple[float, ...]


class FamilyLearner(UpdateLearner[Update]):
    """An agent that learns over a family.

    Args:
        agent: a stable-baselines3 one.
        family: the family's environment; copies of it run side by side.
        envs: episodes side by side, where the agent learns from such; else 1.
        seed: of everything that is drawn.

    Attributes:
        act: the policy's mean action as it is now.
    """

    checkpoint_every = 10

    def __init__(self, agent: SB3Agent, family: FamilyEnv, envs: int, seed: int) -> None:
        self._agent, self._seed = agent, seed
        count = envs if agent.on_policy else 1
        self._envs = FamilyEnvs([family.twin(place) for place in range(count)])
        self._steps = 1 if agent.on_policy else max(1, envs) * self._envs.steps_per_episode
        with own_randomness():
            self._model = agent.build(self._envs, seed)
        self._envs.reset()  # uses up the seeds that the algorithm gave them: each update has its own
        self.act = MeanAction(self._model)
        self._model.set_logger(Logger(folder=None, output_formats=[]))

    def _update(self, index: int, updates: int) -> Update:
        self._agent.on_episode(self._model, index / updates)
        self._begin(self._drawn(index))
        for place, env in enumerate(self._envs.copies):
            env.reseed((self._seed, index, place))
        seen = _Seen()
        self._model.learn(self._steps, callback=seen, reset_num_timesteps=False)
        return Update(index, tuple(seen.advantages), tuple(seen.errors))

    def save_policy(self, directory: Path) -> None:
        save_policy(directory, self._model, Choice(self._agent.name, self._agent.arguments()), self._envs)


class _Seen(BaseCallback):
    """Collects what episodes report."""

    def __init__(self) -> None:
        super().__init__()
        self.advantages: list[float] = []
        self.errors: list[float] = []

    def _on_step(self) -> bool:
        infos: Sequence[dict[str, Any]] = self.locals["infos"]
        self.advantages += [float(info["advantage"]) for info in infos if "advantage" in info]
        self.errors += [float(info["surrogate_error"]) for info in infos if "surrogate_error" in info]
        return True


def advantage_of(act: Actor, env: PruneEnv) -> float:
    """What a policy's plan is worth more than the solver's, in units of what that one loses; see `envs.family`."""
    baseline = env.tried(env.solved()).reward
    return advantage(run_episode(env, act).reward, baseline)
