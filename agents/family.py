"""Learning over a family of tasks, update by update, so that a killed training goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed

from autoprune.agents.base import Actor, run_episode
from autoprune.agents.checkpoint import checkpoint_episodes, load_checkpoint_, save_checkpoint
from autoprune.agents.episodes import FamilyEnvs
from autoprune.agents.policy_file import MeanAction, save_policy
from autoprune.agents.sb3 import SB3Agent
from autoprune.envs.family import FamilyEnv, advantage
from autoprune.envs.prune import PruneEnv
from autoprune.randomness import own_randomness
from autoprune.registry import Choice

CHECKPOINT_EVERY = 10  # updates


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


class FamilyLearner:
    """An agent that learns over a family.

    Args:
        agent: a stable-baselines3 one.
        family: the family's environment; copies of it run side by side.
        envs: episodes side by side, where the agent learns from such; else 1.
        seed: of everything that is drawn.

    Attributes:
        act: the policy's mean action as it is now.
    """

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

    def learn(self, updates: int, directory: Path, on_update: Callable[[Update], None]) -> None:
        """Runs what is missing of `updates`; every one starts with fresh episodes, drawn from its own seed."""
        done = checkpoint_episodes(directory)
        with own_randomness():
            if done:
                load_checkpoint_(directory, self._model)
            for index in range(done, updates):
                self._agent.on_episode(self._model, index / updates)
                on_update(self._update(index))
                if (index + 1) % CHECKPOINT_EVERY == 0 or index + 1 == updates:
                    save_checkpoint(directory, self._model, index + 1)

    def _update(self, index: int) -> Update:
        # What stable-baselines3 draws from are the process's generators, which another process finds in another state.
        set_random_seed(int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0]))
        for place, env in enumerate(self._envs.copies):
            env.reseed((self._seed, index, place))
        self._model._last_obs = None  # what makes stable-baselines3 begin new episodes
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
