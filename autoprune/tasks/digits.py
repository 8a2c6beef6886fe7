"""scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998), enlarged so that convolutions do real work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import ShiftFlip, TensorBatches, normalised, stratified_split
from autoprune.tasks.zoo import build_model, image_model, positive

SIDE = 32
DENSE_TRAINING = TrainingSettings(epochs=12, learning_rate=0.1, weight_decay=5e-4, warmup=0.1)


def digits(
    model: str | Mapping[str, Any] = "residual_cnn",
    widths: Sequence[int] | None = None,
    blocks: int | None = None,
    augment: bool = True,
    batch_size: int = 64,
    seed: int = 0,
) -> Task:
    """Ten classes of 1x32x32 images; 1,078 to train, 360 to validate, 359 to test, the same ones always.

    Args:
        model: a name of the zoo, or a table of one and its arguments.
        widths: the model's `widths`; its own default when left out.
        blocks: the model's `blocks`; its own default when left out.
        augment: shift the training images by up to 2 pixels.
        batch_size: training samples a step.
        seed: of the model's initial weights.

    Raises:
        ConfigError: an argument out of range, or one the model does not take.
    """
    positive("batch_size", batch_size)
    x, y = _images()
    parts = stratified_split(y, (0.6, 0.2, 0.2))
    train_x, validation_x, test_x = normalised(*(x[part] for part in parts))
    train_y, validation_y, test_y = (y[part] for part in parts)
    train = TensorBatches(train_x, train_y, batch_size, shuffle=True, augment=ShiftFlip(2) if augment else None)
    return Task(
        name="digits",
        model=build_model(*image_model(model, widths, blocks), in_channels=1, size=SIDE, classes=10, seed=seed),
        train=train,
        calibration=train.first(128, 64),
        validation=TensorBatches(validation_x, validation_y),
        testing=TensorBatches(test_x, test_y),
        loss=functional.cross_entropy,
        dense_training=DENSE_TRAINING,
    )


def _images() -> tuple[Tensor, Tensor]:
    data = load_digits()
    x = torch.from_numpy(data.images / 16.0).float()[:, None]  # (N, 1, 8, 8)
    return functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear"), torch.from_numpy(data.target).long()
