"""Fashion-MNIST (Xiao et al. 2017), from the files of Debian's dataset-fashion-mnist."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import FileError
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import ShiftFlip, TensorBatches, normalised
from autoprune.tasks.zoo import build_model, model_args, positive

FOLDER = "/usr/share/datasets/fashion-mnist"
INSTALL = "apt-get install dataset-fashion-mnist"
SIDE, CLASSES = 28, 10
VALIDATION = 5_000  # held out from the end of the train split, whose order is random already
DENSE_TRAINING = TrainingSettings(epochs=6, learning_rate=0.1, weight_decay=5e-4, warmup=0.15)


def fashion_mnist(
    folder: str = FOLDER,
    model: str = "residual_cnn",
    widths: Sequence[int] = (32, 64, 128),
    blocks: int | None = None,
    augment: bool = True,
    batch_size: int = 128,
    seed: int = 0,
) -> Task:
    """Ten classes of 1x28x28 images; 55,000 to train, 5,000 to validate, the official 10,000 to test.

    Args:
        folder: where the four ``*-ubyte.gz`` files are.
        model: a name of the zoo.
        widths: the model's `widths`.
        blocks: the model's `blocks`; its own default when left out.
        augment: shift the training images by up to 2 pixels and mirror half of them.
        batch_size: training samples a step.
        seed: of the model's initial weights.

    Raises:
        FileError: the files are missing (the message is the command that installs them) or corrupt.
        ConfigError: an argument out of range, or one the model does not take.
    """
    positive("batch_size", batch_size)
    train_x, train_y = _split(Path(folder), "train", 60_000)
    test_x, test_y = _split(Path(folder), "t10k", 10_000)
    train_x, validation_x, test_x = normalised(train_x[:-VALIDATION], train_x[-VALIDATION:], test_x)
    train_y, validation_y = train_y[:-VALIDATION], train_y[-VALIDATION:]
    change = ShiftFlip(2, flip=True) if augment else None
    train = TensorBatches(train_x, train_y, batch_size, shuffle=True, augment=change)
    return Task(
        name="fashion_mnist",
        model=build_model(model, model_args(widths, blocks), in_channels=1, size=SIDE, classes=CLASSES, seed=seed),
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
