"""torch with channels-last tensors: often faster for convolutions, the same for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.latency.engines.base import Call, DenseEngine, Inputs
from autoprune.latency.engines.eager import torch_call


class ChannelsLast(DenseEngine):
    """torch eager, weights and images in ``channels_last``."""

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        # mypy knows no overload of `to` with a memory format alone.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return torch_call(model, tuple(_channels_last(value) for value in inputs), threads)


def _channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value
