"""The fetch model against misses counted by cachegrind: ``python -m benchmarks fetch`` (a few minutes).

Each packed layer's native op is linked into a small program of its own and run under valgrind's cachegrind, which
simulates the same two caches from the instructions really executed. What one inference misses is the difference between
runs of two and of three. Then what ordering the work by the model saves, and what the kernels take.

Needs gcc and valgrind (``apt-get install gcc valgrind``). Writes benchmarks/results/fetch.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from autoprune.patterns.group import Group
from autoprune.progress import Progress
from autoprune.repack import pack
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Conv2d
from autoprune.repack.kernels.compiler import Target, object_code
from autoprune.repack.kernels.offset_gemm import offset_gemm_module
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import NativeStep
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.runtime.program import Program
from autoprune.repack.tuning.cache_model import Cache, Fetched, What, fetched
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

DRIVER = Path(__file__).with_name("fetch_driver.c")
FIRST, PAGE = 0x20_0000_0000, 1 << 16  # where the copy lies, and what its addresses agree with ours modulo
CACHES = (Cache(32 * 1024, 64, 8), Cache(512 * 1024, 64, 8))
COUNTED = Target(8, "haswell", "+avx2,+fma")  # valgrind knows its instructions
SIZE, ROUNDS = 8, 40
# (channels, extent, sparsity), of ResNet-18's 3x3 layers
LAYERS = [(64, 56, 0.75), (128, 28, 0.75), (256, 14, 0.75), (512, 7, 0.75), (128, 28, 0.5), (128, 28, 0.9)]
ORDERS = {
    "rising": Tiling(SIZE, 24),
    "serpentine": Tiling(SIZE, 24, serpentine=True),
    "panels": Tiling(SIZE, 192, panel=288),
    "panels, serpentine": Tiling(SIZE, 192, panel=288, serpentine=True),
}
COUNTED_ORDERS = ("rising", "panels, serpentine")


@dataclass(frozen=True)
class Layer:
    """A packed 3x3 convolution in a program of its own."""

    channels: int
    extent: int
    sparsity: float

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.extent}x{self.extent}, {100 * self.sparsity:.0f}%"


class Built:
    """A layer's op, its memory filled."""

    def __init__(self, layer: Layer, tiling: Tiling) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(layer.channels, layer.channels, 3, 3, generator=generator)
        weight *= Group(SIZE).mask(weight.abs(), layer.sparsity)
        self.tiling, self.weights = tiling, Weights.of(pack(weight, size=SIZE), None)
        op = Conv2d(
            "y", ("x",), {"weight": "w"}, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, activation="relu"
        )
        shape = (1, layer.channels, layer.extent, layer.extent)
        graph = Graph((Input("x", shape, "float32"),), (op,), "y", {"w": weight})
        self.program = Program(graph, {"y": self.weights}, {"y": tiling}, threads=1)
        plan = self.program.plan((shape,))
        self.frame = plan.frame()
        with torch.inference_mode():
            plan.run_in(self.frame, (torch.randn(shape, generator=generator),))
        step = next(step for step in plan.lowered.steps if isinstance(step, NativeStep) and step.layer)
        self.op: NativeOp = step.build(self.weights, tiling)

    def modelled(self, cache: Cache, target: Target) -> Fetched:
        return fetched(self.op, Conv2d, SIZE, target, self.frame.slots, cache)

    def blob(self) -> bytes:
        """What the driver needs: the op's arrays and buffers, each at an address that is ours modulo PAGE."""
        pieces: list[tuple[int, bytes]] = []
        end = FIRST

        def put(data: bytes, address: int) -> int:
            nonlocal end
            place = end + (address - end) % PAGE
            pieces.append((place, data))
            end = place + len(data)
            return place

        arrays = self.op.arrays.items()
        places = {entry: put(array.tobytes(), array.ctypes.data) for entry, array in arrays}
        slots = self.frame.slots.copy()
        for slot, holder in enumerate(self.frame.holders):
            if holder.numel():
                slots[slot] = put(holder.contiguous().numpy().tobytes(), int(slots[slot]))
        slots_at, fields_at = put(slots.tobytes(), end), end
        put(self.op.moved(places, fields_at).tobytes(), fields_at)
        memory = bytearray(end - FIRST)
        for place, data in pieces:
            memory[place - FIRST : place - FIRST + len(data)] = data
        head = np.array([FIRST, len(memory), fields_at, slots_at, self.op.items], np.int64)
        return head.tobytes() + bytes(memory)


def counted(built: Built, folder: Path) -> tuple[int, int]:
    """Lines missed in the first and the second cache, by cachegrind."""
    (folder / "op.o").write_bytes(object_code(offset_gemm_module(SIZE, COUNTED), COUNTED))
    (folder / "blob").write_bytes(built.blob())
    program = folder / "driver"
    subprocess.run(["gcc", "-O1", "-no-pie", "-w", str(DRIVER), str(folder / "op.o"), "-o", str(program)], check=True)
    first, second = (f"{cache.capacity},{cache.ways},{cache.line}" for cache in CACHES)
    missed = []
    for turns in (2, 3):
        options = ["--cache-sim=yes", f"--D1={first}", f"--LL={second}", f"--cachegrind-out-file={folder / 'out'}"]
        command = ["valgrind", "--tool=cachegrind", *options, str(program), str(folder / "blob"), str(turns)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        numbers = [re.search(rf"{name}\s+misses:\s+([\d,]+)", told) for name in ("D1", "LLd")]
        missed.append([int(number.group(1).replace(",", "")) for number in numbers if number])
    (one, two), (three, four) = missed
    return three - one, four - two


def validation(layers: list[Layer], progress: Progress) -> str:
    rows, cells = [], [(layer, name) for layer in layers for name in COUNTED_ORDERS]
    with tempfile.TemporaryDirectory() as folder, progress.bar("counting", len(cells)) as bar:
        for layer, name in cells:
            built = Built(layer, ORDERS[name])
            real = counted(built, Path(folder))
            row = [str(layer), name]
            for cache, lines in zip(CACHES, real, strict=True):
                model = built.modelled(cache, COUNTED).total
                row += [f"{model:,}", f"{lines:,}", f"{100 * (model / lines - 1):+.1f}%"]
            rows.append(row)
            bar.advance(1, " ".join(row))
    header = ("layer", "order", "first: model", "counted", "", "second: model", "counted", "")
    return markdown_table(header, rows, left=2)


def orders(layers: list[Layer], progress: Progress) -> str:
    rows = []
    with progress.bar("ordering", len(layers)) as bar:
        for layer in layers:
            forms = {name: Built(layer, tiling) for name, tiling in ORDERS.items()}
            fetched = {
                name: [form.modelled(cache, form.program.target) for cache in CACHES] for name, form in forms.items()
            }
            took = timed(forms)
            for name in forms:
                lines = fetched[name]
                kinds = [f"{lines[0].lines[what]:,}" for what in What]
                ratio = median(a / b for a, b in zip(took["rising"], took[name], strict=True))
                rows.append((str(layer), name, *kinds, f"{lines[0].bytes / 1e6:.1f}", f"{lines[1].bytes / 1e6:.1f}",
                             f"{1e6 * median(took[name]):.0f}", f"{ratio:.2f}x"))  # fmt: skip
            bar.advance(1)
    kinds = [what.name.lower() for what in What]
    header = ("layer", "order", *kinds, "MB into the first cache", "into the second", "us", "faster than rising")
    return markdown_table(header, rows, left=2)


def timed(forms: dict[str, Built]) -> dict[str, list[float]]:
    """Seconds of one run of the op, every form in turns."""
    sequences = {name: NativeSequence([form.op]) for name, form in forms.items()}
    took: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, sequence in sequences.items():
            slots = forms[name].frame.slots.ctypes.data
            sequence.run_op(0, slots)
            start = time.perf_counter()
            sequence.run_op(0, slots)
            took[name].append(time.perf_counter() - start)
    return took


def main(argv: Sequence[str]) -> int:
    given = command_line("fetch", __doc__).parse_args(argv)
    missing = [tool for tool in ("gcc", "valgrind") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not found; install them: apt-get install {' '.join(missing)}")
    torch.set_num_threads(1)
    console, layers = Console(), [Layer(*each) for each in LAYERS]
    first, second = (f"{cache.capacity // 1024} KB, {cache.ways} ways" for cache in CACHES)
    text = page(
        "Lines fetched by packed convolutions",
        "fetch",
        "Packed 3x3 convolutions of ResNet-18, groups of 8, batch 1, one "
        f"thread. Two caches of 64-byte lines: {first}; {second}. Lines one inference fetches after another.",
        "## The model and what cachegrind counted",
        validation(layers[:3], console),
        "## What the order of work saves",
        "Lines into the first cache by what they hold, as modelled; the kernels in turns, medians. Rising: a group of "
        "filters walks its kept positions as they come, for 24 positions of the map at a time. Serpentine: every other "
        "group walks them backwards. Panels: a group walks 288 inputs for 192 positions, then the next inputs.",
        orders(layers, console),
        str(Provenance.here()),
    )
    write_page(given.output, "fetch", text)
    return 0
