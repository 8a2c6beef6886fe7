"""Packed layers against torch's dense ones, a layer at a time: ``python -m benchmarks layers``.

Each packed layer is timed inside a program, in the layout it has there, in turns with the faster of torch's contiguous
and channels_last. Writes benchmarks/results/layers.md.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.latency.timer import Protocol
from autoprune.model.inventory import take_inventory
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, capture, repack
from autoprune.repack.tuning.layer_times import LayerTime, layer_times
from autoprune.repack.tuning.roofline import bf16_gflops, fma_gflops, int8_gops, int8_instruction
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance
from benchmarks.lib.pruning import pruned

# (input channels, filters, extent of the input map, kernel, stride)
CONVOLUTIONS = [
    (16, 16, 32, 3, 1),
    (32, 32, 16, 3, 1),
    (64, 64, 8, 3, 1),
    (32, 32, 32, 3, 1),
    (32, 64, 32, 3, 2),
    (64, 64, 16, 3, 1),
    (128, 128, 8, 3, 1),
    (256, 64, 56, 1, 1),
    (512, 128, 28, 1, 1),
]
# Its 3x3 convolutions.
RESNET18 = [
    (64, 64, 56, 3, 1),
    (64, 128, 56, 3, 2),
    (128, 128, 28, 3, 1),
    (128, 256, 28, 3, 2),
    (256, 256, 14, 3, 1),
    (256, 512, 14, 3, 2),
    (512, 512, 7, 3, 1),
]
FEATURES = 4096
LINEAR = f"linear {FEATURES}->{FEATURES}"
PEAK_GOAL = 0.7
LINEAR_GOALS = {0.75: 3.0, 0.9: 6.0}
BATCH = 1
SPARSITIES = (0.5, 0.75, 0.9)
GROUP_SIZES = (1, 4, 8, 16)
PROTOCOL = Protocol(samples=15, warmup=2)


def measure(module: nn.Conv2d | nn.Linear, x: Tensor) -> dict[tuple[float, int], LayerTime]:
    """The layer inside a program, at each (sparsity, group size); in turns with torch's dense layer."""
    dense, times = nn.Sequential(module), {}
    graph, layers = capture(dense, (x,)), take_inventory(dense, x, min_weights=1).layers
    for sparsity, size in itertools.product(SPARSITIES, GROUP_SIZES):
        model = pruned(dense, layers, Choice("group", {"size": size}), sparsity)
        fast = repack(model, x, form="program", graph=graph, threads=1)
        assert isinstance(fast, ProgramModel)
        rows = layer_times(fast, model, x, PROTOCOL)
        times[sparsity, size] = next(row for row in rows if row.kind in ("conv2d", "linear"))
    return times


def rows(title: str, times: Mapping[tuple[float, int], LayerTime], peak: float) -> list[str]:
    """Table rows of one layer: ``microseconds (times faster than dense, share of the peak)`` a group size."""
    lines = []
    for sparsity in SPARSITIES:
        line = [times[sparsity, size] for size in GROUP_SIZES]
        cells = [f"{row.median_us:.1f} ({faster(row):.2f}x, {row.gflops / peak:.0%})" for row in line]
        dense = min(line, key=dense_us)
        label = f"{title} | {dense_us(dense):.1f} {dense.dense_format}"
        lines.append(f"| {label} | {sparsity} | " + " | ".join(cells) + " |")
    return lines


def dense_us(row: LayerTime) -> float:
    assert row.dense_us is not None
    return row.dense_us


def faster(row: LayerTime) -> float:
    """Times faster than dense, of one run."""
    return dense_us(row) / row.median_us


def goals(found: Mapping[str, Mapping[tuple[float, int], LayerTime]], peak: float) -> list[str]:
    """What the project set out for, and what was measured."""
    lines = ["| goal | measured |", "|---|---|"]
    shares = {name: found[name][0.75, 8].gflops / peak for name in (title_of(*each) for each in RESNET18)}
    lowest = min(shares, key=shares.__getitem__)
    reached = sum(share >= PEAK_GOAL for share in shares.values())
    lines.append(
        f"| ResNet-18's 3x3 layers, 75%, G=8: at least {PEAK_GOAL:.0%} of the peak | {reached} of {len(shares)}; "
        f"lowest {shares[lowest]:.0%} ({lowest}) |"
    )
    for sparsity, times in LINEAR_GOALS.items():
        measured = faster(found[LINEAR][sparsity, 16])
        lines.append(f"| {LINEAR}, batch 1, {sparsity:.0%}, G=16: {times:.0f}x over dense | {measured:.2f}x |")
    return lines


def peaks_text(float32: float, int8: float | None, bf16: float | None, in_bytes: str | None) -> str:
    """What one core reaches with one instruction alone, in every precision that it has one for."""
    others = {"bytes" if in_bytes is None else f"bytes ({in_bytes})": int8, "bfloat16 numbers": bf16}
    text = f"Peak: {float32:.0f} GFLOP/s, the best that one core reached with independent fused multiply-adds alone."
    for name, peak in others.items():
        text += f" Dot products of {name}: " + ("no instruction." if peak is None else f"{peak:.0f} G a second.")
    return text


def title_of(channels: int, filters: int, extent: int, kernel: int, stride: int) -> str:
    return f"conv {channels}->{filters}, {extent}x{extent}, {kernel}x{kernel}" + (f" / {stride}" if stride > 1 else "")


def layers() -> list[tuple[str, nn.Conv2d | nn.Linear, Tensor]]:
    torch.manual_seed(0)
    made: list[tuple[str, nn.Conv2d | nn.Linear, Tensor]] = []
    for channels, filters, extent, kernel, stride in (*CONVOLUTIONS, *RESNET18):
        conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2).eval()
        x = torch.randn(BATCH, channels, extent, extent)
        made.append((title_of(channels, filters, extent, kernel, stride), conv, x))
    made.append((LINEAR, nn.Linear(FEATURES, FEATURES).eval(), torch.randn(BATCH, FEATURES)))
    return made


def main(argv: Sequence[str]) -> int:
    given = command_line("layers", __doc__).parse_args(argv)
    start, load = time.perf_counter(), os.getloadavg()[0]
    torch.set_num_threads(1)
    peak = fma_gflops()
    found = {}
    table = [
        "| layer | dense us | sparsity | " + " | ".join(f"G={size}" for size in GROUP_SIZES) + " |",
        "|---|---|---:|" + "---|" * len(GROUP_SIZES),
    ]
    with torch.inference_mode():
        for title, module, x in layers():
            found[title] = measure(module, x)
            lines = rows(title, found[title], peak)
            print("\n".join(lines), flush=True)
            table += lines
    text = page(
        "Packed layers against torch's dense layers",
        "layers",
        "Each packed cell: microseconds of the layer's operation inside a "
        "program, in the layout it has there (times faster than dense; useful work, that of kept weights, as a share "
        "of the peak), for filters pruned in groups of G. Dense: the faster of contiguous and channels_last, timed in "
        "turns with each cell; shown is the fastest of the row's.",
        peaks_text(peak, int8_gops(), bf16_gflops(), int8_instruction()),
        f"One thread, batch {BATCH}, float32; median of {PROTOCOL.samples} interleaved samples; "
        f"load average when it began: {load:.1f}.",
        str(Provenance.here()),
        "\n".join(table),
        "\n".join(goals(found, peak)),
    )
    write_page(given.output, "layers", text)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0
