"""Models whose layers are all in bfloat16, whatever is faster on this machine."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from autoprune.repack import ProgramModel, repack
from autoprune.repack.kernels.compiler import host
from autoprune.repack.tuning.tuning import TuningCache

needs_bf16 = pytest.mark.skipif(not host().bf16, reason="this CPU multiplies no bfloat16 numbers")


class Told(dict[str, float]):
    """Every layer gains as much."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self._gain = gain

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> float:
        return self._gain


def in_bf16(model: nn.Module, x: Any, gain: float = 2.0, threads: int | None = 1) -> ProgramModel:
    """The model repacked in bf16, on a machine where every layer is `gain` times as fast so."""
    cache = TuningCache()
    cache.bf16_gains = Told(gain)
    made = repack(model, x, form="program", precision="bf16", threads=threads, cache=cache)
    assert isinstance(made, ProgramModel)
    return made
