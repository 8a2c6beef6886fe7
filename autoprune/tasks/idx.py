"""Tasks of 28x28 grey images in ten classes, from IDX files: the format and the split that MNIST began."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import ConfigError, FileError
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import ShiftFlip, TensorBatches, normalised
from autoprune.tasks.zoo import build_model, image_model, positive

SIDE, CLASSES = 28, 10
IMAGES, TESTING = 60_000, 10_000  # of the two files; of the first, VALIDATION are held out
VALIDATION = 5_000  # from its end: its order is random already
TRAINING = IMAGES - VALIDATION
DENSE_TRAINING = TrainingSettings(epochs=6, learning_rate=0.1, weight_decay=5e-4, warmup=0.15)


@dataclass(frozen=True)
class IdxTask:
    """A task by the name of where its images come from.

    Attributes:
        name: of the task.
        folder: where its four files are, when a call does not say.
        suffix: of the files, ``.gz`` when they are packed.
        install: the command that gets them.
        model: of the zoo, when a call does not say.
        mirrored: whether a mirrored image is of the same class, so that it may be trained on.
    """

    name: str
    folder: str
    suffix: str
    install: str
    model: str
    mirrored: bool

    def __call__(
        self,
        folder: str | None = None,
        model: str | Mapping[str, Any] | None = None,
        widths: Sequence[int] | None = None,
        blocks: int | None = None,
        augment: bool = True,
        train_samples: int = TRAINING,
        validation_samples: int = VALIDATION,
        batch_size: int = 128,
        seed: int = 0,
    ) -> Task:
        """Ten classes of 1x28x28 images; 55,000 to train, 5,000 to validate, the official 10,000 to test.

        Args:
            folder: where the four ``*-ubyte`` files are; the task's own when left out.
            model: a name of the zoo, or a table of one and its arguments; the task's own when left out.
            widths: the model's `widths`; its own default when left out, (32, 64, 128) for `residual_cnn`.
            blocks: the model's `blocks`; its own default when left out.
            augment: shift the training images by up to 2 pixels and, where the task allows it, mirror half of them.
            train_samples: the first so many are trained on.
            validation_samples: the last so many of the train split are held out to validate.
            batch_size: training samples a step.
            seed: of the model's initial weights.

        Raises:
            FileError: the files are missing (the message is the command that installs them) or corrupt.
            ConfigError: an argument out of range, or one the model does not take.
        """
        positive("batch_size, train_samples and validation_samples", batch_size, train_samples, validation_samples)
        if validation_samples > VALIDATION or train_samples > TRAINING:
            raise ConfigError(
                f"{self.name} has {TRAINING:,} images to train on and {VALIDATION:,} to validate, "
                f"not {train_samples:,} and {validation_samples:,}."
            )
        chosen = self.model if model is None else model
        if chosen == "residual_cnn" and widths is None:
            widths = (32, 64, 128)
        given = Path(self.folder if folder is None else folder)
        train_x, train_y = _read_split(self, given, "train", IMAGES)
        test_x, test_y = _read_split(self, given, "t10k", TESTING)
        held_out = slice(IMAGES - validation_samples, None)
        train_x, validation_x, test_x = normalised(train_x[:train_samples], train_x[held_out], test_x)
        train_y, validation_y = train_y[:train_samples], train_y[held_out]
        change = ShiftFlip(2, flip=self.mirrored) if augment else None
        train = TensorBatches(train_x, train_y, batch_size, shuffle=True, augment=change)
        zoo = image_model(chosen, widths, blocks)
        return Task(
            name=self.name,
            model=build_model(*zoo, in_channels=1, size=SIDE, classes=CLASSES, seed=seed),
            train=train,
            calibration=train.first(512, 128),
            validation=TensorBatches(validation_x, validation_y),
            testing=TensorBatches(test_x, test_y),
            loss=functional.cross_entropy,
            dense_training=DENSE_TRAINING,
        )


def _read_split(source: IdxTask, folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    images = read_idx(folder / f"{name}-images-idx3-ubyte{source.suffix}", (count, SIDE, SIDE), source.install)
    path = folder / f"{name}-labels-idx1-ubyte{source.suffix}"
    labels = read_idx(path, (count,), source.install)
    if int(labels.max()) >= CLASSES:
        raise FileError(f"{path} is corrupt: it holds the label {int(labels.max())}.")
    return images[:, None].float() / 255.0, labels.long()


def read_idx(path: Path, shape: tuple[int, ...], install: str) -> Tensor:
    """Reads an IDX file of unsigned bytes: 2 zero bytes, the type 8, the rank, each extent, the values.

    Args:
        path: of the file; packed by gzip when its name ends so.
        shape: what its header must say.
        install: the command that gets it, for the errors.

    Raises:
        FileError: it is missing, is corrupt or holds something else.
    """
    if not path.is_file():
        raise FileError(f"{path} not found; install it: {install}")
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    values = int(np.prod(shape))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            raw = handle.read(len(header) + values + 1)  # no more than it may hold, whatever it unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path} is corrupt ({error}); install it again: {install}") from None
    if raw[: len(header)] != header or len(raw) != len(header) + values:
        raise FileError(f"{path} is not an IDX file of {shape} unsigned bytes; install it again: {install}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, values, len(header)).reshape(shape).copy())
