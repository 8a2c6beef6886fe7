"""Calibration data as it is named on the command line: a function of the user's own that yields batches, or a file."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.files import given_path, on_disk
from autoprune.model.arguments import Arguments
from autoprune.model.given import called, kind
from autoprune.tasks.batches import in_pieces
from autoprune.tasks.functions import is_path, result_of

MOST = 64  # batches of a function that are read: ranges do not get better by more
SAMPLES = 32  # of a file, in a batch at least
Batch = tuple[Tensor, ...]


def calibration_batches(given: str, model: nn.Module, inputs: Batch) -> list[Batch]:
    """The calibration data that --calibration names.

    Args:
        given: ``package.module:function``, called without arguments, which returns or yields batches, each as the model
            is called; its first `MOST` are taken. Or a file: ``.npy``, an array of the samples of the model's one
            input, or ``.safetensors``, a tensor for each input under the name of the model's parameter.
        model: that is to be quantised.
        inputs: an example of its inputs.

    Returns:
        Batches of the model's inputs, by place.

    Raises:
        ConfigError: there is no such function or file, or what it gives are no batches of the model's inputs.
        GivenError: the function raised something while it yielded them.
    """
    if is_path(given) and not Path(given).exists():
        batches = _of_function(given)
    else:
        batches = iter([_of_file(given_path(given))])
    made = []
    for number, batch in enumerate(batches, 1):
        call = Arguments.of(batch)
        try:
            inspect.signature(model.forward).bind(*call.args, **call.kwargs)
        except TypeError as error:
            raise ConfigError(
                f"--calibration {given}: batch {number} is not as the model is called: {error}. Give its inputs alone, "
                "without targets, under the names of its parameters or in their order."
            ) from error
        tensors = call.ordered(model).tensors
        if len(tensors) != len(inputs):
            raise ConfigError(
                f"--calibration {given}: batch {number} holds {len(tensors)} tensors, and the model takes "
                f"{len(inputs)}: give batches of its inputs alone, without targets, each as the model is called."
            )
        made.append(tensors)
    if not made:
        raise ConfigError(f"--calibration {given} gives no batch: some inputs, as the model will see them, are needed.")
    if is_path(given):
        return made
    samples = Arguments(*made[0]).samples
    if not samples:
        raise ConfigError(
            f"--calibration {given} holds no samples: its first tensor has the shape {tuple(made[0][0].shape)}. Give "
            "one whose first axis counts them."
        )
    return in_pieces(made, min(samples, max(SAMPLES, Arguments(*inputs).samples)))


def _of_function(path: str) -> Iterator[Any]:
    batches = result_of("--calibration", path)
    if isinstance(batches, Tensor) or not hasattr(batches, "__iter__"):
        raise ConfigError(f"--calibration {path} must return a list of batches, or yield them, not {kind(batches)}.")
    with called(f"the batches of --calibration {path} cannot be read"):
        yield from islice(batches, MOST)


def _of_file(path: Path) -> Any:
    """The one batch that a file holds, as the model is called."""
    if path.suffix not in (".npy", ".safetensors"):
        raise ConfigError(
            f"--calibration {path} is neither package.module:function nor a file that ends in .npy or .safetensors."
        )
    with on_disk(path, "read"):
        if not path.exists():
            raise ConfigError(f"--calibration: {path} not found.")
        try:
            if path.suffix == ".npy":
                return _in_float32(torch.from_numpy(np.load(path, allow_pickle=False)))
            tensors = {name: _in_float32(tensor) for name, tensor in load_file(path).items()}
        except (SafetensorError, ValueError, TypeError, EOFError) as error:
            raise ConfigError(f"--calibration: {path} cannot be read: {error}.") from error
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _in_float32(data: Tensor) -> Tensor:
    """As models are repacked: numpy's own floats are of twice the bits."""
    return data.float() if data.is_floating_point() else data
