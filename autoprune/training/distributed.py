"""Training in several processes: what a pruning method sees is made the same in all, so that all cut alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn

from autoprune.training.loop import epoch_seed


def several() -> bool:
    """Whether this is one of several processes of torch's default group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Alike:
    """Makes the first process's random numbers and batch norm statistics everyone's, while a method works.

    DistributedDataParallel averages gradients; nothing else is shared between two steps. Each process may have a seed
    of its own, and has batch norm statistics of its own data, which criteria that read data would rank by.
    In a single process nothing is changed, random numbers included.

    Args:
        model: gets the first process's weights and buffers, as DistributedDataParallel would give it.
        reads_data: whether the method runs the model on calibration batches.
    """

    def __init__(self, model: nn.Module, *, reads_data: bool) -> None:
        self._seed: int | None = None
        self._buffers = list(model.buffers()) if reads_data else []
        if not several():
            return
        seed = torch.tensor(torch.initial_seed() >> 1)  # of the first process; draws nothing
        with torch.no_grad():
            for tensor in (seed, *model.parameters(), *model.buffers()):
                distributed.broadcast(tensor, src=0)
        self._seed = int(seed)

    @contextmanager
    def __call__(self, moment: int) -> Iterator[None]:
        """The same random numbers at the same `moment`, from 0; afterwards each process's own, as if unused."""
        if self._seed is None:
            yield
            return
        own = [buffer.clone() for buffer in self._buffers]
        with torch.no_grad():
            for buffer in self._buffers:
                distributed.broadcast(buffer, src=0)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(epoch_seed(self._seed, moment))
                yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(self._buffers, own, strict=True):
                    buffer.copy_(value)
