"""Checkpoints of a stable-baselines3 algorithm without pickles: tensors in safetensors, the rest in JSON.

Taken between episodes, they hold all that the next episode depends on: networks, optimisers, replay buffer,
counters and every random state. A search resumed from one continues as if it had never stopped.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

from autoprune.errors import FileError
from autoprune.files import read_json, read_tensors, write_json, write_tensors

CHECKPOINT_VERSION = 1
_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num")
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def _files(directory: Path) -> tuple[Path, Path]:
    return directory / "agent.json", directory / "agent"


def checkpoint_episodes(directory: Path) -> int:
    """Episodes the checkpoint in `directory` stands after; 0 when there is none."""
    state, _ = _files(directory)
    return int(read_json(state, "the agent's checkpoint")["episodes"]) if state.exists() else 0


def save_checkpoint(directory: Path, model: BaseAlgorithm, episodes: int) -> None:
    """Writes the checkpoint: tensors under a new name first, then the JSON that points to them."""
    state_path, stem = _files(directory)
    names, variables = model._get_torch_save_params()
    tensors: dict[str, Tensor] = {"torch_rng": torch.get_rng_state()}
    plain: dict[str, Any] = {}
    for name in names:
        _flatten(name, _attribute(model, name).state_dict(), tensors, plain)
    for name in variables:
        tensors[f"variable/{name}"] = _attribute(model, name)
    buffer = _replay_buffer(model)
    if buffer is not None:
        size = buffer.buffer_size if buffer.full else buffer.pos
        for name in _BUFFER:
            tensors[f"buffer/{name}"] = torch.from_numpy(np.ascontiguousarray(getattr(buffer, name)[:size]))
    numpy_state: Any = np.random.get_state()
    tensor_file = stem.with_name(f"agent-{episodes}.safetensors")
    write_tensors(tensor_file, tensors)
    write_json(
        state_path,
        {
            "version": CHECKPOINT_VERSION,
            "episodes": episodes,
            "tensors": tensor_file.name,
            "algorithm": type(model).__name__,
            "counters": {name: getattr(model, name) for name in _COUNTERS if hasattr(model, name)},
            "plain": plain,
            "buffer": None if buffer is None else {"pos": buffer.pos, "full": buffer.full},
            "python_random": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
            "numpy_random": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
            "action_random": model.action_space.np_random.bit_generator.state,
        },
    )
    for old in directory.glob("agent-*.safetensors"):
        if old != tensor_file:
            old.unlink()


def load_checkpoint_(directory: Path, model: BaseAlgorithm) -> None:
    """Restores a checkpoint into a freshly built `model` of the same algorithm and sizes."""
    state_path, _ = _files(directory)
    state = read_json(state_path, "the agent's checkpoint")
    try:
        if state["version"] != CHECKPOINT_VERSION or state["algorithm"] != type(model).__name__:
            raise ValueError(f"it holds {state['algorithm']} version {state['version']}")
        tensors, _ = read_tensors(directory / Path(state["tensors"]).name, "the agent's checkpoint")
        names, variables = model._get_torch_save_params()
        for name in names:
            target = _attribute(model, name)
            target.load_state_dict(_unflatten(name, target.state_dict(), tensors, state["plain"]))
        for name in variables:
            _attribute(model, name).data.copy_(tensors[f"variable/{name}"])
        _restore_buffer_(model, state["buffer"], tensors)
        for name, value in state["counters"].items():
            if name in _COUNTERS:
                setattr(model, name, int(value))
        torch.set_rng_state(tensors["torch_rng"])
        version, inner, gauss = state["python_random"]
        random.setstate((version, tuple(inner), gauss))
        kind, keys, *rest = state["numpy_random"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        model.action_space.np_random.bit_generator.state = state["action_random"]
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise FileError(
            f"the agent's checkpoint in {directory} does not fit this search ({error}). "
            "Delete the run's 'search' folder to start its search again."
        ) from None


def _restore_buffer_(model: BaseAlgorithm, saved: Any, tensors: dict[str, Tensor]) -> None:
    buffer = _replay_buffer(model)
    if buffer is None:
        return
    size = buffer.buffer_size if saved["full"] else int(saved["pos"])
    for name in _BUFFER:
        stored = tensors[f"buffer/{name}"].numpy()
        if stored.shape[0] != size or stored.shape[1:] != getattr(buffer, name).shape[1:]:
            raise ValueError(f"its replay buffer has another size: {name} {stored.shape}")
        getattr(buffer, name)[:size] = stored
    buffer.pos, buffer.full = int(saved["pos"]), bool(saved["full"])


def _replay_buffer(model: BaseAlgorithm) -> ReplayBuffer | None:
    return model.replay_buffer if isinstance(model, OffPolicyAlgorithm) else None


def _attribute(model: Any, dotted: str) -> Any:
    return functools.reduce(getattr, dotted.split("."), model)


def _flatten(prefix: str, value: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[prefix] = value
    elif isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{prefix}/{key}", inner, tensors, plain)
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, (dict, Tensor)) for inner in value):
        for index, inner in enumerate(value):
            _flatten(f"{prefix}/{index}", inner, tensors, plain)
    else:
        plain[prefix] = value


def _unflatten(prefix: str, like: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """Rebuilds a module's or an optimiser's state dict; `like` is the fresh one's."""
    if "param_groups" not in like:
        return {key: tensors[f"{prefix}/{key}"] for key in like}
    groups = [
        {key: plain[f"{prefix}/param_groups/{index}/{key}"] for key in group}
        for index, group in enumerate(like["param_groups"])
    ]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}/state/"):
            index, key = name.removeprefix(f"{prefix}/state/").split("/")
            state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": groups}
