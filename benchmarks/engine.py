"""Repacked models against the best dense engine, whole models at a time.

    python -m benchmarks engine --quick                     # ResNet-18, batch 1, one thread, G=8: about five minutes
    python -m benchmarks engine                             # everything: hours
    python -m benchmarks engine --models resnet18,resnet50 --sparsities 0.5,0.9 --groups 8 --batches 1 --threads 1
    python -m benchmarks engine --quick --precisions float32,int8 --blocks 1,4 --isa vnni
    python -m benchmarks engine --roofline                  # ResNet-18 at 75%, G=8, a layer at a time: a minute

A cell is one model at one sparsity, group size, block, precision, batch and number of threads: all engines, of all
precisions, and the repacked model timed in turns. Models in int8 are calibrated with the same batches; --isa vnni keeps
all of them from AMX. Cells are kept in benchmarks/results/engine/ as they are measured, a file a machine, so a run that
was stopped goes on with the first that is missing; --redo measures again. Zeros do not change the speed of a dense
engine, so one that was far from the best in the first cell of a model, batch and number of threads is left out of the
others. benchmarks/results/engine.md and the plots beside it are drawn from that file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.latency.engines import ENGINES, baselines, best_engine
from autoprune.latency.engines.base import Call, EnginePrecision
from autoprune.latency.timer import SETTLE_MS, Latency, Protocol, measure_together, speedup
from autoprune.masks import Masks, apply_masks_
from autoprune.model.inventory import take_inventory
from autoprune.progress import Progress
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, RepackedModel
from autoprune.repack.rivals import ROUNDED, signal_to_noise_db
from autoprune.repack.tuning.layer_times import layer_times
from autoprune.repack.tuning.roofline import fma_gflops, l3_gbs, memory_gbs
from autoprune.report.console import Console
from autoprune.tasks.zoo.standard import STANDARD, standard_input, standard_model
from benchmarks.deepsparse_engine import DeepSparse
from benchmarks.engine_report import REPACKED, Cell, Row, report, results_file, roofline, save_roofline, spread
from benchmarks.lib.command_line import add_report, among, command_line, listed
from benchmarks.lib.isa import ALL, ISAS, hold_to
from benchmarks.lib.provenance import commit, machine_key
from benchmarks.lib.pruning import magnitude_masks
from benchmarks.lib.sweep import Rows, missing, sweep

PRECISIONS = ("float32", "int8", "bf16")
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)
GROUPS = (1, 4, 8, 16)
BATCHES = (1, 16)
THREADS = (1, 2)
SECONDS = 12.0  # of timing a cell
ROUNDS = (7, 50)  # at least and at most, whatever the seconds
WARMUP = 2
MIN_SAMPLE_MS = 2.0
CALIBRATION = 4  # batches
ROOFLINE = Cell("resnet18", 0.75, 8, 1, 1)
FAR = 1.4  # times the best engine's milliseconds: one that takes as long in a cell is not the best in its neighbours


@dataclass(frozen=True)
class Dense:
    """What the cells of one model, batch and number of threads share.

    Attributes:
        model: in eval mode.
        x: its input.
        calls: of the engines that run it.
        left_out: engine -> why it is missing.
        snr_db: engine -> how close its output is to torch eager's.
        notes: engine -> what it decided.
    """

    model: nn.Module
    x: Tensor
    calls: dict[str, Call]
    left_out: dict[str, str]
    snr_db: dict[str, float]
    notes: dict[str, str]

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
    precisions: Sequence[str] = ("float32",),
    blocks: Sequence[int] = (1,),
    isa: str = ALL,
) -> Iterator[Cell]:
    """Every cell asked for, those that share engines in a row; without zeros there is one group size and block."""
    for batch, count, model in itertools.product(batches, threads, models):
        for sparsity in sparsities:
            shapes = itertools.product(groups, blocks) if sparsity > 0 else [(1, 1)]
            for (group, block), precision in itertools.product(shapes, precisions):
                yield Cell(model, sparsity, group, batch, count, precision, block, isa)


def group_masks(model: nn.Module, x: Tensor, sparsity: float, group: int, block: int = 1) -> Masks:
    """Group-wise magnitude masks of one sparsity, which keep `block` neighbouring inputs together.

    Of every convolution but the first (the stem) and the depthwise ones, and every Linear but the last (the head).
    """
    if sparsity == 0:
        return {}
    layers = take_inventory(model, x).layers
    convolutions = [layer for layer in layers if layer.kind == "conv2d"]
    linears = [layer for layer in layers if layer.kind == "linear"]
    chosen = [layer for layer in convolutions[1:] if layer.conv_groups == 1] + linears[:-1]
    return magnitude_masks(model, chosen, Choice("group", {"size": group, "block": block}), sparsity)


def far_behind(rows: Iterable[Row], cell: Cell) -> dict[str, str]:
    """The engines that were far from the best in a cell that shares its engines with `cell`, and by how much.

    The best of float32 for engines of float32, the best of any precision for the others.
    """
    found = {}
    for row in rows:
        if row.cell.engines == cell.engines:
            for name in (name for name in ENGINES if name in row.times_ms):
                best = row.best if name in baselines() else row.best_any or row.best
                times = row.times_ms[name].median / row.times_ms[best].median
                if times > FAR:
                    found[name] = f"{times:.1f} times as long as {best} in {row.cell}"
    return found


def prepare(cell: Cell, far: Mapping[str, str], progress: Progress) -> Dense:
    """The dense model in every engine that can run it here, but those that are `far` behind."""
    gc.collect()
    torch.compiler.reset()  # what the engines before this left behind
    model, x = standard_model(cell.model), standard_input(cell.model, cell.batch)
    with torch.inference_mode():
        wanted = model(x)
    dense = Dense(model, x, {}, dict(far), {}, {})
    for name in (name for name in ENGINES if name not in far):
        start = time.perf_counter()
        try:
            engine = ENGINES.create(Choice(name))
            call = dense.calls[name] = engine.prepare(model, x, cell.threads, calibration(cell))
            dense.snr_db[name], dense.notes[name] = signal_to_noise_db(call(), wanted), engine.note
            progress.say(
                f"{cell.model}, batch {cell.batch}, {cell.threads} thread(s): {name} prepared in "
                f"{time.perf_counter() - start:.1f} s{engine.note and f' ({engine.note})'}"
            )
        except AutopruneError as error:
            dense.left_out[name] = str(error)
            progress.say(f"{name} left out for {cell.model}: {error}")
    return dense


def calibration(cell: Cell) -> list[Tensor]:
    """The batches from which engines and `repack` find ranges in int8; the timed input is none of them."""
    return [standard_input(cell.model, cell.batch, seed) for seed in range(1, CALIBRATION + 1)]


def repacked(cell: Cell, masked: nn.Module, x: Tensor) -> RepackedModel:
    """The masked model, repacked in the cell's precision."""
    how: dict[str, Any] = {}
    if cell.precision != "float32":
        how = {"precision": cell.precision, "calibration": calibration(cell)}
    return autoprune.repack(masked, x, threads=cell.threads, **how)


def measure(cell: Cell, dense: Dense, seconds: float, deepsparse: DeepSparse | None) -> Row:
    """One cell.

    Raises:
        AutopruneError: the model cannot be repacked, or not to the same outputs.
    """
    masks = group_masks(dense.model, dense.x, cell.sparsity, cell.group, cell.block)
    masked = apply_masks_(copy.deepcopy(dense.model), masks)
    start = time.perf_counter()
    fast = repacked(cell, masked, dense.x)
    repack_s = time.perf_counter() - start
    error = relative_error(fast, masked, dense.x)
    with torch.inference_mode():
        snr_db = signal_to_noise_db(fast(dense.x), masked(dense.x))
    if not error <= ROUNDED[cast(EnginePrecision, cell.precision)]:
        raise AutopruneError(f"{cell}: the repacked model's outputs are {error:.1e} off (relative).")
    calls: dict[str, Call] = {**dense.calls, REPACKED: partial(fast, dense.x)}
    protocol = Protocol(rounds(calls, cell.threads, seconds), WARMUP, cell.threads, MIN_SAMPLE_MS, lead=1)
    load = os.getloadavg()[0]
    times = measure_together(calls, protocol)
    ms = {name: taken.median_ms for name, taken in times.items()}
    best, best_any = best_engine(ms), best_engine(ms, ENGINES)
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
        best_any=best_any,
        speedup_any=speedup(times[best_any], times[REPACKED]),
        snr_db={name: value for name, value in {**dense.snr_db, REPACKED: snr_db}.items() if math.isfinite(value)},
        notes={name: note for name, note in dense.notes.items() if note},
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
        self._shared: tuple[Any, ...] | None = None
        self._dense: Dense | None = None

    def __call__(self, cell: Cell) -> Row:
        far = far_behind(self._known, cell)
        if self._dense is None or cell.engines != self._shared:
            self._dense = None  # given up before the next engines take their memory
            self._shared, self._dense = cell.engines, prepare(cell, far, self._progress)
        self._dense = self._dense.without(far)
        self._known.append(measure(cell, self._dense, self._seconds, self._deepsparse))
        return self._known[-1]


def run(
    rows: Rows[Row], wanted: Sequence[Cell], seconds: float, redo: bool, deepsparse: DeepSparse | None,
    progress: Progress,
) -> int:  # fmt: skip
    """Measures what is missing; returns how many cells failed."""
    bench = Bench(() if redo else rows.last().values(), seconds, deepsparse, progress)
    return sweep(rows, missing(rows, wanted, redo), bench, progress, note=note)


def note(row: Row) -> str:
    """A few words on a measured cell."""
    return f"{row.speedup:.2f}x over {row.best}, {row.speedup_any:.2f}x over {row.best_any}"


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
    parser.add_argument("--precisions", type=among(PRECISIONS), default=("float32",), help="default float32")
    parser.add_argument("--blocks", type=listed(int), default=(1,), help="inputs kept together; default 1: any")
    parser.add_argument(
        "--isa", choices=ISAS, default=ALL, help="all that engines may use of the CPU; default: all of it"
    )
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
    if given.isa != ALL:
        hold_to(given.isa, ["-m", "benchmarks", "engine", *argv])
    if given.roofline:
        progress.say(f"written: {draw_roofline(ROOFLINE, ROUNDS[1], given.output, progress)}")
        return 0
    rows, failed = results_file(given.output, machine_key()), 0
    try:
        if not given.report:
            axes = (given.models, given.sparsities, given.groups, given.batches, given.threads)
            wanted = list(cells(*axes, given.precisions, given.blocks, given.isa))
            deepsparse = DeepSparse(given.deepsparse) if given.deepsparse else None
            failed = run(rows, wanted, given.seconds, given.redo, deepsparse, progress)
    finally:
        print(report(given.output, machine_key()))
    return int(failed > 0)
