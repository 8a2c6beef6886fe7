"""Repacked models against the best dense engine, whole models at a time.

    python -m benchmarks engine --quick                     # ResNet-18, batch 1, one thread, G=8: about five minutes
    python -m benchmarks engine                             # everything: hours
    python -m benchmarks engine --models resnet18,resnet50 --sparsities 0.5,0.9 --groups 8 --batches 1 --threads 1
    python -m benchmarks engine --roofline                  # ResNet-18 at 75%, G=8, a layer at a time: a minute

A cell is one model at one sparsity, group size, batch and number of threads: all engines and the repacked model timed
in turns. Cells are kept in benchmarks/results/engine/ as they are measured, a file a machine, so a run that was stopped
goes on with the first that is missing; --redo measures again. Zeros do not change the speed of a dense engine, so one
that was far from the best in the first cell of a model, batch and number of threads is left out of the others.
benchmarks/results/engine.md and the plots beside it are drawn from that file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.latency.engines import ENGINES, baselines
from autoprune.latency.engines.base import Call
from autoprune.latency.timer import SETTLE_MS, Latency, Protocol, measure_together, speedup
from autoprune.masks import Masks, apply_masks_
from autoprune.model.inventory import take_inventory
from autoprune.progress import Progress
from autoprune.registry import Choice
from autoprune.repack import ProgramModel
from autoprune.repack.tuning.layer_times import layer_times
from autoprune.repack.tuning.roofline import fma_gflops, l3_gbs, memory_gbs
from autoprune.report.console import Console
from autoprune.tasks.zoo.standard import STANDARD, standard_input, standard_model
from benchmarks.deepsparse_engine import DeepSparse
from benchmarks.engine_report import REPACKED, Cell, Row, report, results_file, roofline, save_roofline, spread
from benchmarks.lib.command_line import add_report, among, command_line, listed
from benchmarks.lib.provenance import commit, machine_key
from benchmarks.lib.pruning import magnitude_masks
from benchmarks.lib.sweep import Rows, missing, sweep

SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)
GROUPS = (1, 4, 8, 16)
BATCHES = (1, 16)
THREADS = (1, 2)
SECONDS = 12.0  # of timing a cell
ROUNDS = (7, 50)  # at least and at most, whatever the seconds
WARMUP = 2
MIN_SAMPLE_MS = 2.0
ROOFLINE = Cell("resnet18", 0.75, 8, 1, 1)
FAR = 1.4  # times the best engine's milliseconds: one that takes as long in a cell is not the best in its neighbours
WRONG = 1e-3  # a relative error above this is no result


@dataclass(frozen=True)
class Dense:
    """What the cells of one model, batch and number of threads share."""

    model: nn.Module
    x: Tensor
    calls: dict[str, Call]
    left_out: dict[str, str]

    def without(self, far: Mapping[str, str]) -> Dense:
        """The same without the engines that are far behind."""
        calls = {name: call for name, call in self.calls.items() if name not in far}
        return replace(self, calls=calls, left_out={**self.left_out, **far})


def cells(
    models: Sequence[str],
    sparsities: Sequence[float],
    groups: Sequence[int],
    batches: Sequence[int],
    threads: Sequence[int],
) -> Iterator[Cell]:
    """Every cell asked for, those that share engines in a row; without zeros there is one group size."""
    for batch, count, model in itertools.product(batches, threads, models):
        for sparsity in sparsities:
            for group in groups if sparsity > 0 else (1,):
                yield Cell(model, sparsity, group, batch, count)


def group_masks(model: nn.Module, x: Tensor, sparsity: float, group: int) -> Masks:
    """Group-wise magnitude masks of one sparsity.

    Of every convolution but the first (the stem) and the depthwise ones, and every Linear but the last (the head).
    """
    if sparsity == 0:
        return {}
    layers = take_inventory(model, x).layers
    convolutions = [layer for layer in layers if layer.kind == "conv2d"]
    linears = [layer for layer in layers if layer.kind == "linear"]
    chosen = [layer for layer in convolutions[1:] if layer.conv_groups == 1] + linears[:-1]
    return magnitude_masks(model, chosen, Choice("group", {"size": group}), sparsity)


def far_behind(rows: Iterable[Row], cell: Cell) -> dict[str, str]:
    """The engines that were far from the best in a cell of the same model, batch and threads, and by how much."""
    found = {}
    for row in rows:
        if (row.cell.model, row.cell.batch, row.cell.threads) == (cell.model, cell.batch, cell.threads):
            for name in baselines():
                if name in row.times_ms and row.times_ms[name].median > FAR * row.times_ms[row.best].median:
                    times = row.times_ms[name].median / row.times_ms[row.best].median
                    found[name] = f"{times:.1f} times as long as {row.best} in {row.cell}"
    return found


def prepare(cell: Cell, far: Mapping[str, str], progress: Progress) -> Dense:
    """The dense model in every engine that can run it here, but those that are `far` behind."""
    gc.collect()
    torch.compiler.reset()  # what the engines before this left behind
    model, x = standard_model(cell.model), standard_input(cell.model, cell.batch)
    calls, left_out = {}, dict(far)
    for name in (name for name in ENGINES if name not in far):
        start = time.perf_counter()
        try:
            calls[name] = ENGINES.create(Choice(name)).prepare(model, x, cell.threads)
            progress.say(
                f"{cell.model}, batch {cell.batch}, {cell.threads} thread(s): {name} prepared in "
                f"{time.perf_counter() - start:.1f} s"
            )
        except AutopruneError as error:
            left_out[name] = str(error)
            progress.say(f"{name} left out for {cell.model}: {error}")
    return Dense(model, x, calls, left_out)


def measure(cell: Cell, dense: Dense, seconds: float, deepsparse: DeepSparse | None) -> Row:
    """One cell.

    Raises:
        AutopruneError: the model cannot be repacked, or not to the same outputs.
    """
    masked = apply_masks_(copy.deepcopy(dense.model), group_masks(dense.model, dense.x, cell.sparsity, cell.group))
    start = time.perf_counter()
    fast = autoprune.repack(masked, dense.x, threads=cell.threads)
    repack_s = time.perf_counter() - start
    error = relative_error(fast, masked, dense.x)
    if not error <= WRONG:
        raise AutopruneError(f"{cell}: the repacked model's outputs are {error:.1e} off (relative).")
    calls: dict[str, Call] = {**dense.calls, REPACKED: partial(fast, dense.x)}
    protocol = Protocol(rounds(calls, cell.threads, seconds), WARMUP, cell.threads, MIN_SAMPLE_MS, lead=1)
    load = os.getloadavg()[0]
    times = measure_together(calls, protocol)
    best = min((name for name in baselines() if name in times), key=lambda name: times[name].median_ms)
    ratios = [slow / quick for slow, quick in zip(times[best].samples_ms, times[REPACKED].samples_ms, strict=True)]
    left_out, sparse_ms = dict(dense.left_out), None
    if deepsparse:
        try:
            sparse_ms = deepsparse.measure(masked, dense.x, cell.threads, protocol.samples)
        except AutopruneError as reason:
            left_out["deepsparse"] = str(reason)
    return Row(
        cell=cell,
        times_ms={name: spread(taken.samples_ms) for name, taken in times.items()},
        deepsparse_ms=sparse_ms,
        left_out=left_out,
        best=best,
        speedup=speedup(times[best], times[REPACKED]),
        speedup_spread=spread(ratios),
        relative_error=error,
        repack_s=repack_s,
        rounds=protocol.samples,
        load=load,
        commit=commit(),
    )


def rounds(calls: dict[str, Call], threads: int, seconds: float) -> int:
    """As many rounds as fit into the time, judged by one."""
    once = measure_together(calls, Protocol(samples=1, warmup=1, threads=threads, min_sample_ms=0.0))
    round_ms = sum(_round_ms(taken) + (SETTLE_MS if threads > 1 else 0.0) for taken in once.values())
    return max(ROUNDS[0], min(ROUNDS[1], round(seconds * 1e3 / round_ms)))


def _round_ms(once: Latency) -> float:
    return once.median_ms + max(MIN_SAMPLE_MS, once.median_ms)  # the lead and the sample


def relative_error(fast: nn.Module, masked: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs, as a share of the largest output."""
    with torch.inference_mode():
        given, right = fast(x), masked(x)
    return float((given - right).abs().max() / right.abs().max())


class Bench:
    """Measures cells; the dense engines are prepared once for neighbours that share them.

    Args:
        known: rows of cells measured before; like its own they tell which engines are far behind.
        seconds: of timing a cell.
        deepsparse: None leaves it out.
        progress: gets a line for each engine.
    """

    def __init__(self, known: Iterable[Row], seconds: float, deepsparse: DeepSparse | None, progress: Progress) -> None:
        self._known, self._seconds, self._deepsparse, self._progress = [*known], seconds, deepsparse, progress
        self._shared: tuple[str, int, int] | None = None
        self._dense: Dense | None = None

    def __call__(self, cell: Cell) -> Row:
        far = far_behind(self._known, cell)
        shared = (cell.model, cell.batch, cell.threads)
        if self._dense is None or shared != self._shared:
            self._dense = None  # given up before the next engines take their memory
            self._shared, self._dense = shared, prepare(cell, far, self._progress)
        self._dense = self._dense.without(far)
        self._known.append(measure(cell, self._dense, self._seconds, self._deepsparse))
        return self._known[-1]


def run(
    rows: Rows[Row], wanted: Sequence[Cell], seconds: float, redo: bool, deepsparse: DeepSparse | None,
    progress: Progress,
) -> int:  # fmt: skip
    """Measures what is missing; returns how many cells failed."""
    bench = Bench(() if redo else rows.last().values(), seconds, deepsparse, progress)
    return sweep(
        rows, missing(rows, wanted, redo), bench, progress, note=lambda row: f"{row.speedup:.2f}x over {row.best}"
    )


def draw_roofline(cell: Cell, rounds: int, folder: Path, progress: Progress) -> Path:
    """Times one model's operations and draws them under this machine's roofs.

    Raises:
        AutopruneError: the model cannot be repacked as a program.
    """
    model, x = standard_model(cell.model), standard_input(cell.model, cell.batch)
    apply_masks_(model, group_masks(model, x, cell.sparsity, cell.group))
    progress.say(f"{cell}: repacking and timing, load {os.getloadavg()[0]:.1f}")
    fast = autoprune.repack(model, x, threads=cell.threads, form="program")
    assert isinstance(fast, ProgramModel)
    rows = layer_times(fast, model, x, Protocol(samples=rounds, warmup=WARMUP))
    bandwidths = {"memory": memory_gbs(), "shared cache": l3_gbs()}
    return save_roofline(roofline(rows, f"{cell}: its operations", fma_gflops(), bandwidths), folder)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line("engine", __doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-18, batch 1, one thread, G=8")
    parser.add_argument("--models", type=among(STANDARD), help=f"of {','.join(STANDARD)}")
    parser.add_argument("--sparsities", type=listed(float), default=SPARSITIES)
    parser.add_argument("--groups", type=listed(int), help="group sizes; default 1,4,8,16")
    parser.add_argument("--batches", type=listed(int), help="default 1,16")
    parser.add_argument("--threads", type=listed(int), help="default 1,2")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing a cell; default 12")
    parser.add_argument("--redo", action="store_true", help="measure these cells again")
    parser.add_argument("--roofline", action="store_true", help="only draw the roofline plot of ResNet-18's layers")
    add_report(parser)
    parser.add_argument(
        "--deepsparse",
        metavar="PYTHON",
        default=os.environ.get("AUTOPRUNE_DEEPSPARSE"),
        help="the python of an environment with DeepSparse 1.8; default: the variable AUTOPRUNE_DEEPSPARSE",
    )
    given = parser.parse_args(argv)
    quick: dict[str, Any] = {"models": ("resnet18",), "groups": (8,), "batches": (1,), "threads": (1,)}
    full: dict[str, Any] = {"models": tuple(STANDARD), "groups": GROUPS, "batches": BATCHES, "threads": THREADS}
    for name, value in (quick if given.quick else full).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def main(argv: Sequence[str]) -> int:
    given, progress = arguments(argv), Console()
    if given.roofline:
        progress.say(f"written: {draw_roofline(ROOFLINE, ROUNDS[1], given.output, progress)}")
        return 0
    rows, failed = results_file(given.output, machine_key()), 0
    try:
        if not given.report:
            wanted = list(cells(given.models, given.sparsities, given.groups, given.batches, given.threads))
            deepsparse = DeepSparse(given.deepsparse) if given.deepsparse else None
            failed = run(rows, wanted, given.seconds, given.redo, deepsparse, progress)
    finally:
        print(report(given.output, machine_key()))
    return int(failed > 0)
