"""Fashion-MNIST (Xiao et al. 2017), from the files of Debian's dataset-fashion-mnist."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
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

FOLDER = "/usr/share/datasets/fashion-mnist"
INSTALL = "apt-get install dataset-fashion-mnist"
SIDE, CLASSES = 28, 10
VALIDATION = 5_000  # held out from the end of the train split, whose order is random already
DENSE_TRAINING = TrainingSettings(epochs=6, learning_rate=0.1, weight_decay=5e-4, warmup=0.15)


def fashion_mnist(
    folder: str = FOLDER,
    model: str | Mapping[str, Any] = "residual_cnn",
    widths: Sequence[int] | None = None,
    blocks: int | None = None,
    augment: bool = True,
    train_samples: int = 60_000 - VALIDATION,
    validation_samples: int = VALIDATION,
    batch_size: int = 128,
    seed: int = 0,
) -> Task:
    """Ten classes of 1x28x28 images; 55,000 to train, 5,000 to validate, the official 10,000 to test.

    Args:
        folder: where the four ``*-ubyte.gz`` files are.
        model: a name of the zoo, or a table of one and its arguments.
        widths: the model's `widths`; its own default when left out, (32, 64, 128) for `residual_cnn`.
        blocks: the model's `blocks`; its own default when left out.
        augment: shift the training images by up to 2 pixels and mirror half of them.
        train_samples: the first so many are trained on.
        validation_samples: the last so many of the train split are held out to validate.
        batch_size: training samples a step.
        seed: of the model's initial weights.

    Raises:
        FileError: the files are missing (the message is the command that installs them) or corrupt.
        ConfigError: an argument out of range, or one the model does not take.
    """
    positive("batch_size, train_samples and validation_samples", batch_size, train_samples, validation_samples)
    if validation_samples > VALIDATION or train_samples > 60_000 - VALIDATION:
        raise ConfigError(
            f"fashion_mnist has {60_000 - VALIDATION:,} images to train on and {VALIDATION:,} to validate, "
            f"not {train_samples:,} and {validation_samples:,}."
        )
    if model == "residual_cnn" and widths is None:
        widths = (32, 64, 128)
    train_x, train_y = _split(Path(folder), "train", 60_000)
    test_x, test_y = _split(Path(folder), "t10k", 10_000)
    held_out = slice(60_000 - validation_samples, None)
    train_x, validation_x, test_x = normalised(train_x[:train_samples], train_x[held_out], test_x)
    train_y, validation_y = train_y[:train_samples], train_y[held_out]
    change = ShiftFlip(2, flip=True) if augment else None
    train = TensorBatches(train_x, train_y, batch_size, shuffle=True, augment=change)
    return Task(
        name="fashion_mnist",
        model=build_model(*image_model(model, widths, blocks), in_channels=1, size=SIDE, classes=CLASSES, seed=seed),
        train=train,
        calibration=train.first(512, 128),
        validation=TensorBatches(validation_x, validation_y),
        testing=TensorBatches(test_x, test_y),
        loss=functional.cross_entropy,
        dense_training=DENSE_TRAINING,
    )


def _split(folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder / f"{name}-images-idx3-ubyte.gz", (count, SIDE, SIDE))
    labels = _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", (count,))
    if int(labels.max()) >= CLASSES:
        raise FileError(f"{folder}/{name}-labels-idx1-ubyte.gz is corrupt: it holds the label {int(labels.max())}.")
    return images[:, None].float() / 255.0, labels.long()


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Reads a gzipped IDX file of unsigned bytes: 2 zero bytes, the type 8, the rank, each extent, the values."""
    if not path.is_file():
        raise FileError(f"{path} not found; install it: {INSTALL}")
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    values = int(np.prod(shape))
    try:
        with gzip.open(path) as handle:
            raw = handle.read(len(header) + values + 1)  # no more than it may hold, whatever it unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path} is corrupt ({error}); install it again: {INSTALL}") from None
    if raw[: len(header)] != header or len(raw) != len(header) + values:
        raise FileError(f"{path} is not an IDX file of {shape} unsigned bytes; install it again: {INSTALL}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, values, len(header)).reshape(shape).copy())
