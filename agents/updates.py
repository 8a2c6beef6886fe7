"""Learning update by update, each from a seed of its own: a killed learning goes on as if it had never stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import set_random_seed

from autoprune.agents.checkpoint import checkpoint_episodes, load_checkpoint_, save_checkpoint
from autoprune.randomness import own_randomness

Update = TypeVar("Update")


class UpdateLearner(ABC, Generic[Update]):
    """What learns in updates.

    Attributes:
        checkpoint_every: updates between two checkpoints.
    """

    checkpoint_every: ClassVar[int]
    _model: BaseAlgorithm
    _seed: int

    def learn(self, updates: int, directory: Path, on_update: Callable[[Update], None]) -> None:
        """Runs what is missing of `updates`; every one starts with fresh episodes, drawn from its own seed."""
        done = checkpoint_episodes(directory)
        with own_randomness():
            if done:
                load_checkpoint_(directory, self._model)
            for index in range(done, updates):
                on_update(self._update(index, updates))
                if (index + 1) % self.checkpoint_every == 0 or index + 1 == updates:
                    save_checkpoint(directory, self._model, index + 1)

    @abstractmethod
    def _update(self, index: int, updates: int) -> Update:
        """Runs one of `updates`, counted from 0."""

    def _drawn(self, index: int) -> int:
        """The seed of an update, below 2^32."""
        return int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])

    def _begin(self, seed: int) -> None:
        """Before an update learns."""
        # What stable-baselines3 draws from are the process's generators, which another process finds in another state.
        set_random_seed(seed)
        self._model._last_obs = None  # what makes stable-baselines3 begin new episodes
