"""Batches of tensors that fit in memory, how data is split, and the augmentation of small images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import AutopruneError
from autoprune.masks import Batches
from autoprune.model.given import read
from autoprune.model.inventory import as_tuple
from autoprune.randomness import own_randomness

EVALUATION_BATCH = 64  # feature maps stay in the cache: 2 to 3 times faster than 256 on a small CNN
Inputs = TypeVar("Inputs", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True)
class TensorBatches(Generic[Inputs]):
    """Re-iterable batches of ``x`` (N, ...) and ``y`` (N, ...). All randomness is torch's global generator's.

    Attributes:
        x: inputs: a tensor, or a tuple of them for a model that takes several.
        y: targets.
        batch_size: samples a batch; the last one may be smaller.
        shuffle: a new order every time it is iterated.
        augment: changes each batch of inputs, or None.
    """

    x: Inputs
    y: Tensor
    batch_size: int = EVALUATION_BATCH
    shuffle: bool = False
    augment: Callable[[Inputs], Inputs] | None = None

    def __post_init__(self) -> None:
        for x in as_tuple(self.x):
            if len(x) != len(self.y):
                raise AutopruneError(f"inputs and targets must be as many, not {len(x)} and {len(self.y)}.")
        if self.batch_size < 1:
            raise AutopruneError(f"batch_size must be at least 1, not {self.batch_size}.")

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        order = torch.randperm(len(self.y)) if self.shuffle else torch.arange(len(self.y))
        for indices in torch.split(order, self.batch_size):
            x = _at(self.x, indices)
            yield (self.augment(x) if self.augment else x), self.y[indices]

    def first(self, count: int, batch_size: int) -> tuple[tuple[Inputs, Tensor], ...]:
        """The first `count` samples as fixed batches, in their order and not augmented."""
        indices = torch.arange(min(count, len(self.y)))
        return tuple(TensorBatches(_at(self.x, indices), self.y[indices], batch_size))


@dataclass(frozen=True)
class MappedBatches:
    """Batches, changed one by one as they are read.

    Attributes:
        batches: iterated as often as this is.
        change: ``(inputs, target)`` of each batch -> those in their place.
    """

    batches: Batches
    change: Callable[[Any, Any], tuple[Any, Any]]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # a TypeError, where they have none, is theirs

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for _, inputs, target in read(self.batches, "the data"):
            yield self.change(inputs, target)


def first_batches(batches: Batches, count: int) -> tuple[tuple[Any, Tensor], ...]:
    """The first batches, the same ones in every process and at every call, of a loader that shuffles and augments too.

    Of an iterator, which can be read once only, there are none.

    Raises:
        GivenError: one cannot be read, or is no pair.
    """
    if isinstance(batches, Iterator):
        return ()
    with drawing_alike():
        return tuple((inputs, target) for _, inputs, target in islice(read(batches, "the data"), count))


def in_pieces(batches: Iterable[tuple[Tensor, ...]], samples: int) -> list[tuple[Tensor, ...]]:
    """Batches of inputs cut into batches of exactly so many samples, for what takes no other number of them.

    The last piece of a batch that is no multiple shares samples with the one before it. A batch that holds fewer is
    left out; of no samples there are no batches. Tensors that hold another number of samples than the first one of
    their batch stay whole.
    """
    return [
        tuple(x[start : start + samples] if x.shape[:1] == (count,) else x for x in batch)
        for batch in batches
        if batch and batch[0].ndim and (count := len(batch[0])) >= samples > 0
        for start in (min(first, count - samples) for first in range(0, count, samples))
    ]


@contextmanager
def drawing_alike() -> Iterator[None]:
    """What torch, numpy and Python draw begins at seed 0, and goes on afterwards as if nothing had been drawn."""
    with own_randomness():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        yield


def _at(x: Inputs, indices: Tensor) -> Inputs:
    return tuple(each[indices] for each in x) if isinstance(x, tuple) else x[indices]


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


def stratified_split(y: Tensor, fractions: Sequence[float]) -> tuple[Tensor, ...]:
    """Indices of one part a fraction; every class is split alike, in an order drawn from seed 0.

    Args:
        y: classes (N,), from 0 up.
        fractions: of the parts; their sum is 1.
    """
    generator = np.random.default_rng(0)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    bounds = np.cumsum(fractions)[:-1]
    for label in range(int(y.max()) + 1):
        members = torch.nonzero(y == label).flatten().numpy()
        cuts = (bounds * len(members)).round().astype(int)
        for part, piece in zip(parts, np.split(generator.permutation(members), cuts), strict=True):
            part.append(torch.from_numpy(piece))
    return tuple(torch.from_numpy(generator.permutation(torch.cat(part).numpy())) for part in parts)
