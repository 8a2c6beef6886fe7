"""Repacked models against the best dense engine, whole models at a time.

    python benchmarks/engine.py --quick                     # ResNet-18, batch 1, one thread, G=8: about five minutes
    python benchmarks/engine.py                             # everything: hours
    python benchmarks/engine.py --models resnet18,resnet50 --sparsities 0.5,0.9 --groups 8 --batches 1 --threads 1
    python benchmarks/engine.py --roofline                  # ResNet-18 at 75%, G=8, a layer at a time: a minute

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
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from command_line import among, listed
from deepsparse_engine import DeepSparse
from engine_report import (
    REPACKED,
    Cell,
    Row,
    machine_key,
    read_rows,
    report,
    results_file,
    roofline,
    save_roofline,
    spread,
)
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.files import append_line
from autoprune.latency.engines import ENGINES, baselines
from autoprune.latency.engines.base import Call
from autoprune.latency.timer import SETTLE_MS, Latency, Protocol, measure_together, speedup
from autoprune.masks import Masks, apply_masks_, weight_of
from autoprune.model.inventory import weighted_layers
from autoprune.patterns import PATTERNS
from autoprune.progress import Progress
from autoprune.registry import Choice
from autoprune.repack import ProgramModel
from autoprune.repack.tuning.layer_times import layer_times
from autoprune.repack.tuning.roofline import fma_gflops, l3_gbs, memory_gbs
from autoprune.report.console import Console
from autoprune.tasks.zoo.standard import STANDARD, standard_input, standard_model

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

Value = TypeVar("Value", int, float, str)


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


def group_masks(model: nn.Module, sparsity: float, group: int) -> Masks:
    """Group-wise magnitude masks of one sparsity.

    Of every convolution but the first (the stem) and the depthwise ones, and every Linear but the last (the head).
    """
    if sparsity == 0:
        return {}
    layers = weighted_layers(model)
    convolutions = [(name, layer) for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    chosen = [name for name, layer in convolutions[1:] if layer.groups == 1] + linears[:-1]
    pattern = PATTERNS.create(Choice("group", {"size": group}))
    return {name: pattern.mask(weight_of(model, name).detach().abs(), sparsity) for name in chosen}


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
    masked = apply_masks_(copy.deepcopy(dense.model), group_masks(dense.model, cell.sparsity, cell.group))
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


def commit() -> str:
    """The revision that is measured; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run(wanted: Sequence[Cell], seconds: float, redo: bool, deepsparse: DeepSparse | None, progress: Progress) -> int:
    """Measures what is missing; returns how many cells failed."""
    path = results_file(machine_key())
    done = {} if redo else read_rows(path)
    missing = [cell for cell in wanted if cell not in done]
    progress.say(f"{len(wanted) - len(missing)} of {len(wanted)} cells are measured; results in {path}")
    failed = 0
    with progress.bar("cells", len(missing)) as bar:
        for _, shared in itertools.groupby(missing, key=lambda cell: (cell.model, cell.batch, cell.threads)):
            dense: Dense | None = None
            for cell in shared:
                far = far_behind(done.values(), cell)
                dense = dense or prepare(cell, far, progress)
                dense = dense.without(far)
                note = str(cell)
                try:
                    row = measure(cell, dense, seconds, deepsparse)
                    append_line(path, asdict(row))
                    done[cell] = row
                    note += f": {row.speedup:.2f}x over {row.best}"
                except Exception as error:  # a bug in one cell must not cost the hours of the others
                    failed += 1
                    progress.say(f"failed: {cell}: {type(error).__name__}: {error}")
                bar.advance(note=note)
    return failed


def draw_roofline(cell: Cell, rounds: int, progress: Progress) -> Path:
    """Times one model's operations and draws them under this machine's roofs.

    Raises:
        AutopruneError: the model cannot be repacked as a program.
    """
    model, x = standard_model(cell.model), standard_input(cell.model, cell.batch)
    apply_masks_(model, group_masks(model, cell.sparsity, cell.group))
    progress.say(f"{cell}: repacking and timing, load {os.getloadavg()[0]:.1f}")
    fast = autoprune.repack(model, x, threads=cell.threads, form="program")
    assert isinstance(fast, ProgramModel)
    rows = layer_times(fast, model, x, Protocol(samples=rounds, warmup=WARMUP))
    bandwidths = {"memory": memory_gbs(), "shared cache": l3_gbs()}
    return save_roofline(roofline(rows, f"{cell}: its operations", fma_gflops(), bandwidths))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18, batch 1, one thread, G=8")
    parser.add_argument("--models", type=among(STANDARD), help=f"of {','.join(STANDARD)}")
    parser.add_argument("--sparsities", type=listed(float), default=SPARSITIES)
    parser.add_argument("--groups", type=listed(int), help="group sizes; default 1,4,8,16")
    parser.add_argument("--batches", type=listed(int), help="default 1,16")
    parser.add_argument("--threads", type=listed(int), help="default 1,2")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing a cell; default 12")
    parser.add_argument("--redo", action="store_true", help="measure these cells again")
    parser.add_argument("--roofline", action="store_true", help="only draw the roofline plot of ResNet-18's layers")
    parser.add_argument("--report", action="store_true", help="measure nothing, draw what there is")
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


def main() -> int:
    given, progress = arguments(), Console()
    failed = 0
    try:
        if given.roofline:
            progress.say(f"written: {draw_roofline(ROOFLINE, ROUNDS[1], progress)}")
            return 0
        if not given.report:
            wanted = list(cells(given.models, given.sparsities, given.groups, given.batches, given.threads))
            deepsparse = DeepSparse(given.deepsparse) if given.deepsparse else None
            failed = run(wanted, given.seconds, given.redo, deepsparse, progress)
    except KeyboardInterrupt:
        progress.say("stopped; what was measured is kept, the same command goes on from here")
        failed = 1
    except AutopruneError as error:
        progress.say(f"error: {error}")
        failed = 1
    print(report(machine_key()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
