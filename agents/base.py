"""What an agent is: something that spends a budget of episodes of the environment looking for a good plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autoprune.envs.prune import PruneEnv

Trial = dict[str, Any]  # what the environment's last step reports: plan, measurement, reward and its terms
OnTrial = Callable[[Trial], None]
Actor = Callable[[NDArray[np.float32], int], NDArray[np.float32]]  # (observation, step) -> action


class Agent(ABC):
    """Searches by running episodes; the harness keeps the trials.

    Attributes:
        replays: whether a resumed search makes its state anew by playing every episode again, from the record of
            evaluated plans.
    """

    replays: ClassVar[bool] = False

    @abstractmethod
    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        """Runs episodes `done` .. `episodes` and calls `on_trial` after each, in order.

        Args:
            env: the problem, as episodes.
            episodes: the whole budget.
            seed: of everything the agent draws.
            on_trial: takes each trial.
            directory: where a learner keeps its checkpoint; None keeps none.
            done: episodes that an earlier, interrupted call has already reported.
        """

    def resumable_episodes(self, directory: Path, logged: int) -> int:
        """How many of the `logged` episodes need not be run again; all of them for an agent without memory."""
        return 0 if self.replays else logged

    def save_policy(self, directory: Path, env: PruneEnv) -> bool:
        """Writes the learned policy, if there is one, and says whether there was."""
        return False


def run_episode(env: PruneEnv, act: Actor) -> Trial:
    """Plays one episode and returns its trial."""
    observation, _ = env.reset()
    step, over = 0, False
    info: dict[str, Any] = {}
    while not over:
        observation, _, over, _, info = env.step(act(observation, step))
        step += 1
    trial: Trial = info["trial"]
    return trial
