"""Copies of one environment that step together, so that the plans they end with are evaluated in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from autoprune.envs.prune import PruneEnv
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.plan import Plan


class Lockstep(VecEnv):
    """`count` copies of `env`: episodes have one length, so all end with the same step.

    Attributes:
        remaining: episodes still wanted; plans beyond it are not evaluated and their last reward is 0. None: no end.
    """

    def __init__(self, env: PruneEnv, count: int) -> None:
        # A step changes nothing that shallow copies share.
        self.envs = [copy.copy(env) for _ in range(count)]
        self.remaining: int | None = None
        self._actions: NDArray[np.float32] = np.zeros((count, *env.action_space.shape), np.float32)
        super().__init__(count, env.observation_space, env.action_space)

    def reset(self) -> NDArray[np.float32]:
        return np.stack([env.reset()[0] for env in self.envs])

    def step_async(self, actions: NDArray[np.float32]) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        steps = [env.advance(action) for env, action in zip(self.envs, self._actions, strict=True)]
        observations = np.stack([observation for observation, _, _ in steps])
        rewards = np.array([reward for _, reward, _ in steps], np.float32)
        plans = [plan for _, _, plan in steps if plan is not None]
        infos: list[dict[str, Any]] = [{} for _ in steps]
        if plans:
            for index, trial in enumerate(self._trials(plans)):
                rewards[index] = trial.reward + steps[index][1]
                infos[index]["trial"] = trial.to_json()
            for info, observation in zip(infos, observations, strict=True):
                info["terminal_observation"] = observation
            observations = self.reset()
        return observations, rewards, np.full(len(steps), bool(plans)), infos

    def _trials(self, plans: Sequence[Plan]) -> list[Trial]:
        problem = self.envs[0].problem
        wanted = plans[: self.remaining]
        if self.remaining is not None:
            self.remaining -= len(wanted)
        measured = problem.evaluate.all(wanted)
        return [as_trial(problem, plan, each) for plan, each in zip(wanted, measured, strict=True)]

    def close(self) -> None:
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.envs[index], attr_name) for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        for index in self._get_indices(indices):
            setattr(self.envs[index], attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        methods = self.get_attr(method_name, indices)
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]
