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

import llvmlite.ir as ir
import torch
from torch import Tensor, nn

from autoprune.files import write_text
from autoprune.latency.machine import machine_identity
from autoprune.latency.timer import Latency, Protocol, measure_together, speedup
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import lower_layer
from autoprune.repack.kernels.compiler import compile_function, host
from autoprune.repack.kernels.ir import FLOATS, I64, at, const, fma, load_vector, store_vector

RESULTS = Path(__file__).parent / "results" / "layers.md"
# (input channels, filters, extent of the input map, kernel, stride)
CONVOLUTIONS = [
    (16, 16, 32, 3, 1),
    (32, 32, 16, 3, 1),
    (64, 64, 8, 3, 1),
    (32, 32, 28, 3, 1),
    (128, 128, 7, 3, 1),
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


def peak_gflops() -> float:
    """What one core reaches with independent fused multiply-adds of full vectors and nothing else."""
    target, chains, rounds = host(), 12, 100_000
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS]), "peak")
    b, fused = ir.IRBuilder(function.append_basic_block("entry")), fma(module, target.lanes)
    start = [load_vector(b, at(b, function.args[0], const(target.lanes * i)), target.lanes) for i in range(chains)]
    entry, body, done = b.block, b.append_basic_block("body"), b.append_basic_block("done")
    b.branch(body)
    b.position_at_end(body)
    k, sums = b.phi(I64), [b.phi(each.type) for each in start]
    for total, first in zip([k, *sums], [const(0), *start], strict=True):
        total.add_incoming(first, entry)
    after = [b.call(fused, [total, start[0], start[1]]) for total in sums]
    for total, value in zip([k, *sums], [b.add(k, const(1)), *after], strict=True):
        total.add_incoming(value, body)
    b.cbranch(b.icmp_signed("<", k, const(rounds)), body, done)
    b.position_at_end(done)
    for i, value in enumerate(after):
        store_vector(b, value, at(b, function.args[0], const(target.lanes * i)), target.lanes)
    b.ret_void()
    kernel, numbers = compile_function(module, "peak", target, 1), torch.zeros(chains * target.lanes)
    times = measure_together({"peak": lambda: kernel(numbers.data_ptr())}, PROTOCOL)
    return 2 * chains * target.lanes * rounds / min(times["peak"].samples_ms) / 1e6


def rows(title: str, module: nn.Conv2d | nn.Linear, x: Tensor, peak: float) -> list[str]:
    """Table rows of one layer: ``microseconds (times faster than dense, share of the peak)`` a group size."""
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
            cells.append(f"{fast.median_ms * 1e3:.1f} ({speedup(dense, fast):.2f}x, {rate / peak:.0%})")
        rate = flops / dense.median_ms / 1e6
        label = f"{title} | {dense.median_ms * 1e3:.1f} {best} ({rate / peak:.0%})"
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
    peak = peak_gflops()
    about = ", ".join(f"{key} {value}" for key, value in machine_identity().items())
    head = [
        "# Packed layers against torch's dense layers",
        "",
        "Written by `python benchmarks/layers.py`. Each packed cell: microseconds a call of the `jit` backend (times",
        "faster than dense, useful work, that is of kept weights, as a share of the peak), for filters pruned in",
        "groups of G. Dense: the faster of contiguous and channels_last.",
        "",
        f"Peak: {peak:.0f} GFLOP/s, the best that one core reached with independent fused multiply-adds alone.",
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
            lines = rows(*each, peak)
            print("\n".join(lines), flush=True)
            head += lines
    write_text(RESULTS, "\n".join(head) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {RESULTS}")


if __name__ == "__main__":
    main()
