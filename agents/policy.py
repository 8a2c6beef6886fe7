"""Learned policies, read from their files. Loading one runs no code of the file's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from autoprune.agents import AGENTS
from autoprune.agents.policy_file import POLICY_VERSION, MeanAction
from autoprune.agents.sb3 import SB3Agent
from autoprune.envs.observation import OBSERVATION_VERSION
from autoprune.envs.prune import STARTS, Start
from autoprune.errors import ConfigError, FileError, first_line
from autoprune.files import read_json, read_tensors
from autoprune.registry import Choice

LONGEST = 512  # of observations and actions; a replay buffer is made for them
SHIPPED = Path(__file__).parent / "shipped"  # the policy that comes along


class Policy:
    """A learned policy, ready to act on any problem.

    Attributes:
        act: its mean action.
        actions: of the environment it acts in; likewise `start` and `curves`.
    """

    def __init__(self, model: BaseAlgorithm, actions: Sequence[Choice], start: Start, curves: bool) -> None:
        self.act = MeanAction(model)
        self.actions = tuple(actions)
        self.start, self.curves = start, curves

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Reads a policy from its folder or its ``policy.json``.

        Raises FileError when a file is missing, corrupt, or of another version of observations or actions.
        """
        folder = path if path.is_dir() else path.parent
        about = read_json(folder / "policy.json", "the policy")
        try:
            if (about["version"], about["observation_version"]) != (POLICY_VERSION, OBSERVATION_VERSION):
                raise FileError(
                    f"the policy {folder} was made for observations of version {about['observation_version']}; this "
                    f"release reads version {OBSERVATION_VERSION}. Train it again."
                )
            actions = [Choice.from_json(data) for data in about["actions"]]
            agent = AGENTS.create(Choice.from_json(about["agent"]))
            if not isinstance(agent, SB3Agent):
                raise ConfigError(f"agent {about['agent']['name']!r} learns no policy.")
            start, curves, length = STARTS[STARTS.index(about["start"])], about["curves"], about["observation_length"]
            if type(length) is not int or not 0 < length <= LONGEST or not 0 < len(actions) <= LONGEST:
                raise ValueError(f"observations of length {length!r} for {len(actions)} actions")
            if not isinstance(curves, bool):
                raise TypeError(f"curves is {curves!r}")
            tensors, _ = read_tensors(folder / "policy.safetensors", "the policy")
            _check_size((length, *agent.arguments()["net"], len(actions)), tensors)
        except (LookupError, TypeError, ValueError, ConfigError) as error:
            raise FileError(f"the policy is corrupt: {folder / 'policy.json'} ({error}).") from None
        model = agent.build(_Spaces(length, len(actions)), seed=0)  # type: ignore[arg-type]
        try:
            model.policy.load_state_dict(tensors)
        except RuntimeError as error:
            raise FileError(f"the policy is corrupt: {folder / 'policy.safetensors'} ({first_line(error)}).") from None
        return cls(model, actions, start, curves)


def _check_size(widths: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a network is far larger than what is held for it, before it is built."""
    held, wanted = sum(tensor.numel() for tensor in tensors.values()), sum(a * b for a, b in pairwise(widths))
    if wanted > held:
        raise ValueError(f"layers of widths {widths} have {wanted} weights, and {held} numbers are stored")


class _Spaces(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """An environment that only has spaces: what building a network needs."""

    def __init__(self, observation_length: int, actions: int) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_length,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)
        self.gamma = 1.0
        self.steps_per_episode = 2

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape or (), np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Any:
        raise AssertionError("this environment has spaces only")
