"""A steering policy: a small network in safetensors and JSON, run without the library that trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.checks import check_counts
from autoprune.errors import ConfigError, FileError
from autoprune.files import read_json, read_tensors, write_json, write_tensors
from autoprune.training.steering import ACTION_NAMES, OBSERVATION_NAMES, STEERING_VERSION

_ABOUT, _TENSORS = "policy.json", "policy.safetensors"
_WHAT = "the steering policy"
MOST_SLICES = 1000


@dataclass(frozen=True)
class SteeringPolicy:
    """Observation -> action, by layers with tanh between them.

    Attributes:
        weights: of each layer, ``(out, in)``; the first reads `OBSERVATION_NAMES`, the last gives `ACTION_NAMES`.
        biases: of each, ``(out,)``.
        slices: of a training that it was trained on.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    slices: int

    def __call__(self, observation: Sequence[float]) -> list[float]:
        """The mean action, numbers in [-1, 1]."""
        x = torch.tensor(observation, dtype=torch.float32)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = functional.linear(x if index == 0 else x.tanh(), weight, bias)
        return [float(value) for value in x.clamp(-1.0, 1.0)]

    def save(self, folder: Path) -> None:
        """Writes ``policy.safetensors`` and ``policy.json`` into `folder`."""
        tensors = {f"weight.{index}": weight for index, weight in enumerate(self.weights)}
        write_tensors(folder / _TENSORS, tensors | {f"bias.{index}": bias for index, bias in enumerate(self.biases)})
        about = {"steering_version": STEERING_VERSION, "layers": len(self.weights), "slices": self.slices}
        write_json(folder / _ABOUT, {**about, "observations": list(OBSERVATION_NAMES), "actions": list(ACTION_NAMES)})

    @classmethod
    def load(cls, path: Path) -> SteeringPolicy:
        """Reads a policy from its folder or its ``policy.json``.

        Raises:
            FileError: a file is missing, corrupt, of another version, or no steering policy.
        """
        folder = path if path.is_dir() else path.parent
        about = read_json(folder / _ABOUT, _WHAT)
        if about.get("steering_version") != STEERING_VERSION:
            raise FileError(
                f"{folder} holds no steering policy of version {STEERING_VERSION} (it says "
                f"{about.get('steering_version')!r}): train one with 'autoprune train configs/steering.toml'."
            )
        tensors, _ = read_tensors(folder / _TENSORS, _WHAT)
        try:
            check_counts(_WHAT, {"slices": about["slices"]}, most=MOST_SLICES)
            weights, biases = _layers(tensors, int(about["layers"]))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise FileError(f"{_WHAT} is corrupt: {folder / _ABOUT} ({error}).") from None
        return cls(weights, biases, about["slices"])


def _layers(tensors: Mapping[str, Tensor], count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases; raises ValueError or KeyError where they do not fit each other."""
    if not 0 < count <= len(tensors):
        raise ValueError(f"{count} layers of {len(tensors)} tensors")
    weights = tuple(tensors[f"weight.{index}"] for index in range(count))
    biases = tuple(tensors[f"bias.{index}"] for index in range(count))
    widths = [len(OBSERVATION_NAMES), *(len(bias) for bias in biases)]
    shapes = [tuple(weight.shape) for weight in weights]
    if shapes != [(out, into) for into, out in pairwise(widths)] or widths[-1] != len(ACTION_NAMES):
        raise ValueError(f"layers of shapes {shapes}")
    if not all(bool(torch.isfinite(each).all()) and each.dtype == torch.float32 for each in (*weights, *biases)):
        raise ValueError("its numbers are not finite, or not float32")
    return weights, biases
