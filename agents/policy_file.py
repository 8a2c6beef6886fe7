"""Policy files: what an agent learned, as safetensors + JSON, and the action it means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm

from autoprune.agents.episodes import Planning
from autoprune.envs.observation import OBSERVATION_VERSION
from autoprune.files import write_json, write_tensors
from autoprune.registry import Choice

POLICY_VERSION = 2


def save_policy(directory: Path, model: BaseAlgorithm, agent: Choice, env: Planning) -> None:
    """Writes ``policy.safetensors`` and ``policy.json`` into `directory`."""
    write_tensors(directory / "policy.safetensors", model.policy.state_dict())
    write_json(
        directory / "policy.json",
        {
            "version": POLICY_VERSION,
            "agent": agent.to_json(),
            "observation_version": OBSERVATION_VERSION,
            "observation_length": int(env.observation_space.shape[0]),  # type: ignore[index]
            "actions": [choice.to_json() for choice in env.action_choices],
            "gamma": env.gamma,
            "shaping": env.shaping,
            "start": env.start,
            "curves": env.curves,
        },
    )


class MeanAction:
    """A model's mean action, step by step; a recurrent one's state begins anew with every episode."""

    def __init__(self, model: BaseAlgorithm) -> None:
        self._model = model
        self._state: tuple[NDArray[np.float32], ...] | None = None

    def __call__(self, observation: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        state = self._state if step > 0 else None
        action, self._state = self._model.predict(observation, state, np.array([step == 0]), deterministic=True)
        return np.asarray(action, dtype=np.float32)
