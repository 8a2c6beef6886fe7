"""Packed layers against torch's dense ones, a layer at a time: ``python benchmarks/layers.py``.

The dense time is that of the faster of contiguous and channels_last, timed in turns with the packed layers. Writes
benchmarks/results/layers.md.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
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
# (input channels, filters, extent of the input map, kernel, stride)
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
BATCH = 1
SPARSITIES = (0.5, 0.75, 0.9)
GROUP_SIZES = (1, 4, 8, 16)
PROTOCOL = Protocol(samples=25, warmup=3, threads=1, min_sample_ms=2.0)


def call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def packed(module: nn.Conv2d | nn.Linear, size: int, sparsity: float) -> nn.Module:
    """The layer pruned in groups by magnitude and lowered for this machine."""
    pruned = copy.deepcopy(module)
    pruned.weight.mul_(PATTERNS.create(Choice("group", {"size": size})).mask(pruned.weight.abs(), sparsity))
    return lower_layer(pruned)["jit"]


def measure(module: nn.Conv2d | nn.Linear, x: Tensor) -> dict[str, Latency]:
    """Every form of one layer, in turns. The dense ones are called `contiguous` and `channels_last`."""
    candidates = {"contiguous": call(module, x)}
    if isinstance(module, nn.Conv2d):
        last = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        candidates["channels_last"] = call(last, x.contiguous(memory_format=torch.channels_last))
    for sparsity, size in itertools.product(SPARSITIES, GROUP_SIZES):
        candidates[f"{sparsity}/{size}"] = call(packed(module, size, sparsity), x)
    return measure_together(candidates, PROTOCOL)


def rows(title: str, module: nn.Conv2d | nn.Linear, x: Tensor) -> list[str]:
    """Table rows of one layer: ``microseconds (times faster than dense, GFLOP/s of kept weights)`` a group size."""
    flops = 2 * module.weight.numel() * module(x).numel() / module.weight.shape[0]
    times = measure(module, x)
    best = min((name for name in times if "/" not in name), key=lambda name: times[name].median_ms)
    dense = times[best]
    lines = []
    for sparsity in SPARSITIES:
        cells = []
        for size in GROUP_SIZES:
            fast = times[f"{sparsity}/{size}"]
            rate = flops * (1.0 - sparsity) / fast.median_ms / 1e6
            cells.append(f"{fast.median_ms * 1e3:.1f} ({speedup(dense, fast):.2f}x, {rate:.0f})")
        rate = flops / dense.median_ms / 1e6
        label = f"{title} | {dense.median_ms * 1e3:.1f} {best} ({rate:.0f})"
        lines.append(f"| {label} | {sparsity} | " + " | ".join(cells) + " |")
    return lines


def layers() -> list[tuple[str, nn.Conv2d | nn.Linear, Tensor]]:
    torch.manual_seed(0)
    made: list[tuple[str, nn.Conv2d | nn.Linear, Tensor]] = []
    for channels, filters, extent, kernel, stride in CONVOLUTIONS:
        conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2).eval()
        title = f"conv {channels}->{filters}, {extent}x{extent}, {kernel}x{kernel}" + (
            f" / {stride}" if stride > 1 else ""
        )
        made.append((title, conv, torch.randn(BATCH, channels, extent, extent)))
    made.append((f"linear {FEATURES}->{FEATURES}", nn.Linear(FEATURES, FEATURES).eval(), torch.randn(BATCH, FEATURES)))
    return made


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(PROTOCOL.threads)
    about = ", ".join(f"{key} {value}" for key, value in machine_identity().items())
    head = [
        "# Packed layers against torch's dense layers",
        "",
        "Written by `python benchmarks/layers.py`. Each packed cell: microseconds a call (times faster than dense,",
        "GFLOP/s of useful work, that is of kept weights), for filters pruned in groups of G. Dense: the faster of",
        "contiguous and channels_last (GFLOP/s).",
        "",
        f"threads={PROTOCOL.threads}, batch={BATCH}, float32; median of {PROTOCOL.samples} interleaved samples; "
        f"load average when it began: {os.getloadavg()[0]:.1f}.",
        "",
        f"{about}.",
        "",
        "| layer | dense us | sparsity | " + " | ".join(f"G={size}" for size in GROUP_SIZES) + " |",
        "|---|---|---:|" + "---|" * len(GROUP_SIZES),
    ]
    print("\n".join(head), flush=True)
    with torch.inference_mode():
        for each in layers():
            lines = rows(*each)
            print("\n".join(lines), flush=True)
            head += lines
    write_text(RESULTS, "\n".join(head) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {RESULTS}")


if __name__ == "__main__":
    main()
