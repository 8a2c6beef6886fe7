"""Sequences of different lengths as padded tensors, and the task of giving each one label."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from autoprune.errors import FileError
from autoprune.model.recurrent.modules import cut_states_
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import TensorBatches
from autoprune.tasks.zoo import positive

CALIBRATION, CALIBRATION_BATCH = 128, 64
DEEPENS = 0.6  # of the dense training: until then more and more of a state is cut

Padded = tuple[Tensor, ...]  # (N, T, F) with zeros behind each sequence's end, lengths (N,) int64


def with_cut_states(task: Task, keep: float) -> Task:
    """The task, whose model keeps only the largest share `keep` of each state: fewer and fewer while it trains.

    Raises:
        ConfigError: `keep` is out of (0, 1].
    """
    if keep == 1.0:
        return task
    assert task.dense_training is not None
    assert isinstance(task.train, TensorBatches)
    cut_states_(task.model, keep=keep, over=round(DEEPENS * task.dense_training.epochs * len(task.train)))
    return task


def package_file(package: str, path: str, install: str) -> Path:
    """The file at `path` inside an installed package, which is found but not imported.

    Raises:
        FileError: it is not there; the message is the command that installs it.
    """
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise FileError(f"{path} of the package {package} not found; install it: {install}")


def padded(sequences: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Padded]:
    """Normalises every feature by the steps of the first part, then pads all parts to the longest sequence of any.

    One length for all parts, so that what is captured on one split runs on the others.

    Args:
        sequences: (steps, F) each.
        parts: indices of one part each.
    """
    deviation, mean = torch.std_mean(torch.cat([sequences[int(i)] for i in parts[0]]), dim=0)  # (F,)
    scale = torch.where(deviation > 0, deviation, 1.0)
    x = pad_sequence([(each - mean) / scale for each in sequences], batch_first=True)  # (N, T, F)
    lengths = torch.tensor([len(each) for each in sequences])
    return [(x[part], lengths[part]) for part in parts]


def trimmed(inputs: Padded) -> Padded:
    """Without the steps that are padding in every sequence of the batch: most batches train in half the time."""
    x, lengths = inputs
    return x[:, : int(lengths.max())], lengths


def sequence_task(
    name: str,
    model: nn.Module,
    sequences: Sequence[Tensor],
    y: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    batch_size: int,
    dense_training: TrainingSettings,
) -> Task:
    """The task of labelling sequences, whose model takes ``(x (N, T, F), lengths (N,))``.

    Args:
        name: of the task.
        model: with weights drawn, not trained.
        sequences: (steps, F) each, raw.
        y: classes (N,).
        parts: indices to train, to validate and to test.
        batch_size: training samples a step.
        dense_training: of the dense model.

    Raises:
        ConfigError: the batch size is out of range.
    """
    positive("batch_size", batch_size)
    train_x, validation_x, test_x = padded(sequences, parts)
    train_y, validation_y, test_y = (y[part] for part in parts)
    train = TensorBatches(train_x, train_y, batch_size, shuffle=True, augment=trimmed)
    return Task(
        name=name,
        model=model,
        train=train,
        calibration=train.first(CALIBRATION, CALIBRATION_BATCH),
        validation=TensorBatches(validation_x, validation_y),
        testing=TensorBatches(test_x, test_y),
        loss=functional.cross_entropy,
        dense_training=dense_training,
    )
