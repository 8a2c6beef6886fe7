"""Japanese vowels: who of nine men says "ae" (Kudo et al. 1999), from the files of the package aeon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import stratified_split
from autoprune.tasks.sequences import package_file, sequence_task, with_cut_states
from autoprune.tasks.zoo import build_sequence_model

INSTALL = "pip install --no-deps aeon==1.6.0"
FEATURES, CLASSES = 12, 9
DENSE_TRAINING = TrainingSettings(
    epochs=60, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1, clip_norm=1.0
)


def japanese_vowels(
    folder: str | None = None,
    model: str = "lstm_classifier",
    hidden: int = 64,
    layers: int = 1,
    bidirectional: bool = True,
    cell: str = "lstm",
    dropout: float = 0.2,
    state_keep: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> Task:
    """Nine speakers, 12 coefficients of linear prediction a step, 7 to 29 steps; the official 270 and 370 to test.

    Of the 270, six a speaker are held out to validate, always the same ones.

    Args:
        folder: where the two ``.ts`` files are; that of the installed package when left out.
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
        FileError: the files are missing (the message is the command that installs them) or corrupt.
        ConfigError: an argument out of range, or one the model does not take.
    """
    args = {"hidden": hidden, "layers": layers, "bidirectional": bidirectional, "cell": cell, "dropout": dropout}
    built = build_sequence_model(model, args, features=FEATURES, classes=CLASSES, seed=seed)
    train_x, train_y = read_ts(_path(folder, "TRAIN"))
    test_x, test_y = read_ts(_path(folder, "TEST"))
    train, validation = stratified_split(train_y, (0.8, 0.2))
    parts = (train, validation, torch.arange(len(test_y)) + len(train_y))
    y = torch.cat([train_y, test_y])
    task = sequence_task("japanese_vowels", built, train_x + test_x, y, parts, batch_size, DENSE_TRAINING)
    return with_cut_states(task, state_keep)


def _path(folder: str | None, split: str) -> Path:
    name = f"JapaneseVowels_{split}.ts"
    if folder is not None:
        return Path(folder) / name
    return package_file("aeon", f"datasets/data/JapaneseVowels/{name}", INSTALL)


def read_ts(path: Path) -> tuple[list[Tensor], Tensor]:
    """Reads a ``.ts`` file: the sequences, (steps, features) each, and their classes (N,), in the header's order.

    Behind the header's ``@data`` a line is a sequence: its features parted by colons, the steps of each parted by
    commas, the class last.

    Raises:
        FileError: the file is missing or corrupt.
    """
    if not path.is_file():
        raise FileError(f"{path} not found; install it: {INSTALL}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        header = [line.lower() for line in lines].index("@data")
        (declared,) = [line for line in lines[:header] if line.lower().startswith("@classlabel")]
        rows = [_row(line, declared.split()[2:]) for line in lines[header + 1 :] if line]
        if not rows:
            raise ValueError("it holds no sequence")
    except ValueError as error:
        raise FileError(f"{path} is corrupt ({error}); install it again: {INSTALL}") from None
    return [x for x, _ in rows], torch.tensor([y for _, y in rows])


def _row(line: str, classes: Sequence[str]) -> tuple[Tensor, int]:
    *features, label = line.split(":")
    x = torch.tensor([[float(value) for value in feature.split(",")] for feature in features])  # (features, steps)
    if len(x) != FEATURES or not bool(torch.isfinite(x).all()):
        raise ValueError(f"a sequence has {len(x)} features, or one that is not finite; {FEATURES} are due")
    if label not in classes[:CLASSES]:
        raise ValueError(f"a sequence is of the class {label!r}, not one of {', '.join(classes[:CLASSES])}")
    return x.T.contiguous(), classes.index(label)
