"""What a stable-baselines3 algorithm is built for: one problem's episodes, or a family's, several side by side."""

from __future__ import annotations

from collections.abc import Sequence

from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from autoprune.envs.family import FamilyEnv
from autoprune.envs.prune import PruneEnv
from autoprune.envs.steer import SteerEnv


class FamilyEnvs(DummyVecEnv):
    """Copies of one family's environment, side by side."""

    def __init__(self, copies: Sequence[FamilyEnv]) -> None:
        super().__init__([lambda copy=copy: copy for copy in copies])  # type: ignore[misc]
        self.copies = tuple(copies)
        first = copies[0]
        self.action_choices, self.start, self.curves = first.action_choices, first.start, first.curves
        self.gamma, self.shaping = first.gamma, first.shaping
        self.steps_per_episode = first.steps_per_episode


class SteerEnvs(DummyVecEnv):
    """Steered trainings side by side."""

    def __init__(self, envs: Sequence[SteerEnv]) -> None:
        super().__init__([lambda env=env: env for env in envs])  # type: ignore[misc]
        self.copies = tuple(envs)
        self.gamma, self.steps_per_episode = envs[0].gamma, envs[0].steps_per_episode


Planning = PruneEnv | FamilyEnvs  # whose actions make a plan
Episodes = Planning | SteerEnvs  # what an algorithm is built for


def actions_of(env: Episodes) -> int:
    """How many numbers an action has."""
    assert isinstance(env.action_space, spaces.Box)
    return len(env.action_space.low)
