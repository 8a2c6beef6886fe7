"""Packed layers against torch's dense ones, a layer at a time: ``python benchmarks/layers.py``.

The dense layer is the faster of contiguous and channels_last, timed in turns with the packed ones. Writes
benchmarks/results/layers.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.files import write_text
from autoprune.latency.machine import machine_identity
from autoprune.latency.timer import Latency, Protocol, measure_together, speedup
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import lower_layer

RESULTS = Path(__file__).parent / "results" / "layers.md"
# (input channels, filters, map, kernel, stride)
CONVOLUTIONS = [
    (16, 16, 32, 3, 1),
    (32, 32, 32, 3, 1),
    (32, 64, 32, 3, 2),
    (64, 64, 16, 3, 1),
    (128, 128, 8, 3, 1),
    (64, 64, 14, 3, 1),
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (256, 64, 56, 1, 1),
    (512, 128, 28, 1, 1),
]
FEATURES = 4096
SPARSITIES = (0.5, 0.75, 0.9)
GROUP_SIZES = (1, 4, 8, 16)
BATCH = 1
PROTOCOL = Protocol(samples=15, warmup=3, threads=1, min_sample_ms=2.0)
HEADER = """| layer | dense us (layout) | sparsity | {sizes} |
|---|---:|---:|{rules}|
"""


def call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def dense_forms(module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The dense layer in each memory layout."""
    forms = {"contiguous": call(module, x)}
    if x.dim() == 4:
        last = type(module)(64, 64, 1) if False else _channels_last(module)
        forms["channels_last"] = call(last, x.contiguous(memory_format=torch.channels_last))
    return forms
