"""Natively built models: their sizes for each processor, and what a call of one takes.

    python -m benchmarks build

Sizes are of object files, nothing linked to them: code, read-only data (weights and plan), and the memory that a call
works in. Calls are timed on this machine, in turns: the built model called by ctypes, the repacked program bound to
its tensors, and the program called as a model is. Instructions are counted by qemu, of a call of the pruned and of the
dense model. Needs what `tests/emulated` needs: a C compiler; qemu and a cross compiler for the instructions. Writes
benchmarks/results/build.md.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import numpy as np
import torch
from torch import Tensor

from autoprune.latency.timer import Protocol, measure_together, speedup
from autoprune.repack import ProgramModel
from autoprune.repack.aot.build import Compiled, compiled
from autoprune.repack.aot.sections import section_sizes
from autoprune.repack.aot.targets import HOST, PLATFORMS, platform
from autoprune.repack.aot.toolchain import toolchain
from autoprune.report.table import markdown_table
from benchmarks.build_models import SUBJECTS
from benchmarks.build_programs import instructions, runs
from benchmarks.lib.command_line import among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

TIMED = ("digits-90", "resnet20", "lstm", "encoder", "bert_mini", "mobilenet_v2")
SIZED = (*TIMED, "digits-90-int8", "resnet20-int8")
COUNTED = ("digits", "resnet20", "mobilenet_v2", "lstm")
COUNTED_ON = "aarch64"
STARTS = 9
FIRST_RESULT = """
import ctypes, json, sys, time
import numpy as np
path, name, inputs, outputs, workspace = json.loads(sys.argv[1])
memory = np.zeros(workspace + 64, np.uint8)
x, y = ([np.zeros(size, np.uint8) for size in sizes] for sizes in (inputs, outputs))
start = time.perf_counter()
library = ctypes.CDLL(path)
place = ctypes.c_void_p(memory.ctypes.data + -memory.ctypes.data % 64)
status = getattr(library, name + "_prepare")(place)
status |= getattr(library, name + "_run")(*(ctypes.c_void_p(each.ctypes.data) for each in (*x, *y)), place)
print((time.perf_counter() - start) * 1e3 if not status else "refused")
"""


@dataclass(frozen=True)
class Library:
    """A built model as a shared library of this machine."""

    built: Compiled
    path: Path

    def call(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """One inference of `inputs`, as C makes it."""
        (model,), name = self.built.calls, self.built.name
        library = ctypes.CDLL(str(self.path))
        memory = np.zeros(model.workspace_bytes + 64, np.uint8)
        held = [each.contiguous() for each in inputs]
        made = [torch.zeros(each.port.shape) for each in model.outputs]
        place = ctypes.c_void_p(memory.ctypes.data + -memory.ctypes.data % 64)
        given = [*(ctypes.c_void_p(each.data_ptr()) for each in (*held, *made)), place]
        if getattr(library, f"{name}_prepare")(place):
            raise RuntimeError("the built model takes no such workspace")
        run = getattr(library, f"{name}_run")

        def infer(keep: object = (memory, held)) -> list[Tensor]:
            if run(*given):
                raise RuntimeError("the built model refuses its inputs")
            return made

        return infer

    def first_result_ms(self) -> float:
        """From opening the library to its first result, in a process of its own; the median."""
        (model,) = self.built.calls
        ports = (model.inputs, [each.port for each in model.outputs])
        sizes = [[each.bytes for each in some] for some in ports]
        given = json.dumps([str(self.path), self.built.name, *sizes, model.workspace_bytes])
        command = [sys.executable, "-c", FIRST_RESULT, given]
        return statistics.median(float(subprocess.check_output(command, text=True)) for _ in range(STARTS))


def library(fast: ProgramModel, folder: Path) -> Library:
    built, found = compiled(fast, HOST), toolchain(platform(HOST))
    if found is None:
        raise RuntimeError("there is no C compiler")
    code, path = folder / "model.o", folder / "model.so"
    code.write_bytes(built.code)
    found.shared_library([code], path)
    return Library(built, path)


def size_rows(name: str, fast: ProgramModel) -> list[list[str]]:
    rows = []
    for target in PLATFORMS:
        made = compiled(fast, target)
        figures = (section_sizes(made.code)["code"], made.data_bytes, len(made.code), made.calls[0].workspace_bytes)
        rows.append([name, target, *(f"{each:,}" for each in figures)])
    return rows


def time_row(name: str, fast: ProgramModel) -> list[str]:
    given = SUBJECTS[name].given()
    with tempfile.TemporaryDirectory() as folder:
        made = library(fast, Path(folder))
        native = made.call(given)
        protocol = Protocol(samples=30, threads=1)
        found = measure_together(
            {"native": native, "bound": fast.bind(*given), "plain": lambda: fast(*given)}, protocol
        )
        first = made.first_result_ms()
    ratios = [f"{speedup(found[each], found['native']):.2f}" for each in ("bound", "plain")]
    return [name, f"{found['native'].median_ms * 1e3:.1f}", *ratios, f"{first:.1f}"]


def count_row(name: str) -> list[str]:
    """Instructions of one call, dense and pruned: the difference of a program that makes two and one that makes one."""
    subject, how, counts = SUBJECTS[name], runs(platform(COUNTED_ON)), []
    if isinstance(how, str):
        return [name, COUNTED_ON, f"not counted: {how}", "", ""]
    for sparsity in (0.0, subject.sparsity):
        made = compiled(subject.repacked(sparsity), COUNTED_ON)
        with tempfile.TemporaryDirectory() as folder:
            one, two = (instructions(made, subject.given(), Path(folder), how, turns) for turns in (1, 2))
        counts.append(two - one)
    dense, pruned = counts
    return [name, COUNTED_ON, f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.2f}"]


def main(argv: Sequence[str]) -> int:
    parser = command_line("build", __doc__)
    for option, usual in (("sized", SIZED), ("timed", TIMED), ("counted", COUNTED)):
        parser.add_argument(f"--{option}", type=among(SUBJECTS), default=usual, help=f"default {','.join(usual)}")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes, times = [], []
    for name in dict.fromkeys((*given.sized, *given.timed)):
        print(name, file=sys.stderr)
        fast = SUBJECTS[name].repacked()
        sizes += size_rows(name, fast) if name in given.sized else []
        times += [time_row(name, fast)] if name in given.timed else []
    counts = [count_row(name) for name in given.counted]
    text = page(
        "Built models", "build",
        "Models pruned to 75% in groups of 16 filters where no other figure is named, for one thread.",
        "## Sizes", "In bytes.",
        markdown_table(("model", "target", "code", "read-only data", "object file", "workspace"), sizes, left=2),
        "## Calls",
        "Of this machine's build, in turns with the repacked program: how much longer the program takes, bound to its "
        f"tensors and called with them. The first result: median of {STARTS} processes, from opening the library on.",
        markdown_table(("model", "microseconds", "bound takes", "plain takes", "first result, ms"), times),
        "## Instructions",
        "Executed by a call, as qemu counts them.",
        markdown_table(("model", "target", "dense", "pruned", "ratio"), counts, left=2),
        f"{Provenance.here()} llvmlite {llvmlite.__version__}.",
    )  # fmt: skip
    write_page(given.output, "build", text)
    return 0
