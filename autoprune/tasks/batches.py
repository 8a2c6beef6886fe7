"""Batches of tensors that fit in memory, and the augmentation of small images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import AutopruneError

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TensorBatches:
    """Re-iterable batches of ``x`` (N, ...) and ``y`` (N,). All randomness is torch's global generator's.

    Attributes:
        x: inputs.
        y: targets.
        batch_size: samples a batch; the last one may be smaller.
        shuffle: a new order every time it is iterated.
        augment: changes each batch of inputs, or None.
    """

    x: Tensor
    y: Tensor
    batch_size: int = EVALUATION_BATCH
    shuffle: bool = False
    augment: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise AutopruneError(f"inputs and targets must be as many, not {len(self.x)} and {len(self.y)}.")
        if self.batch_size < 1:
            raise AutopruneError(f"batch_size must be at least 1, not {self.batch_size}.")

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x)) if self.shuffle else torch.arange(len(self.x))
        for indices in torch.split(order, self.batch_size):
            x = self.x[indices]
            yield (self.augment(x) if self.augment else x), self.y[indices]

    def first(self, count: int, batch_size: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """The first `count` samples as fixed batches, in their order and not augmented."""
        return tuple(TensorBatches(self.x[:count], self.y[:count], batch_size))


@dataclass(frozen=True)
class ShiftFlip:
    """Moves each image by up to `pixels` each way, filling with its darkest value, and mirrors half of them.

    (N, C, H, W) -> (N, C, H, W).
    """

    pixels: int = 2
    flip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        reach = 2 * self.pixels + 1
        rows = torch.arange(height) + torch.randint(reach, (n, 1))  # (N, H)
        columns = torch.arange(width) + torch.randint(reach, (n, 1))  # (N, W)
        if self.flip:
            columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
        padded = functional.pad(x, (self.pixels,) * 4, value=float(x.min()))
        picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
        return picked.permute(0, 3, 1, 2)  # channels last in memory: convolutions train faster so on a CPU


def normalised(*splits: Tensor) -> tuple[Tensor, ...]:
    """Every split less the first one's mean, over its deviation."""
    deviation, mean = torch.std_mean(splits[0])
    return tuple((split - mean) / deviation for split in splits)
