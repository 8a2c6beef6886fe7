"""torch as it is, contiguous tensors: what most people run, and the baseline of a run's own speed-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from autoprune.latency.engines.base import Call, DenseEngine, Inputs
from autoprune.latency.timer import torch_threads


class Eager(DenseEngine):
    """torch eager."""

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        return torch_call(model, inputs, threads)


def torch_call(model: Callable[..., object], inputs: tuple[Any, ...], threads: int) -> Call:
    """One inference in torch; the modes are set only where the caller has not, since that takes time."""

    def run() -> object:
        if torch.is_inference_mode_enabled() and torch.get_num_threads() == threads:
            return model(*inputs)
        with torch.inference_mode(), torch_threads(threads):
            return model(*inputs)

    return run
