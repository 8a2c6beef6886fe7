"""What `python -m benchmarks dynamic` measures: each image's latency, what lives, where the time goes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import llvmlite.ir as ir
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.latency.timer import Protocol, measure_together
from autoprune.model.channel_gates import Gating, gate_channels_, gates, live_shares
from autoprune.model.inventory import take_inventory
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, repack
from autoprune.repack.kernels.compiler import Kernel, host
from autoprune.repack.native.op import NativeOp
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.tuning.layer_times import COPY, layer_times
from autoprune.report.console import Console
from autoprune.tasks import TASKS
from benchmarks.dynamic_runs import PATTERN, PLACES, Run, task
from benchmarks.lib.pruning import prune_

IMAGES, ROUNDS = 200, 15
PROFILED = 5  # images
WIDTHS = ([16, 32, 64], [32, 64, 128])
SHARES = (1.0, 0.75, 0.5, 0.25)
SPARSITIES = (0.0, 0.75, 0.9)


@dataclass(frozen=True, eq=False)
class Measured:
    """A run's latency.

    Attributes:
        ms: (rounds, images) milliseconds of a call.
        native_ms: likewise of the native code alone, without the Python around it.
        live: mean share of groups that live; 1 without gates.
        all_live_ms: median milliseconds of the same model whose gates let everything pass; of itself without gates.
        profile: microseconds of predictors, convolutions, layout copies and the rest; and of the call around them.
    """

    run: Run
    ms: NDArray[np.float64]
    native_ms: NDArray[np.float64]
    live: float
    all_live_ms: float
    profile: Mapping[str, float]

    @property
    def per_image(self) -> NDArray[np.float64]:
        """Median milliseconds of a call with each image."""
        return np.median(self.ms, axis=0)

    @property
    def mean_ms(self) -> float:
        return float(self.per_image.mean())

    @property
    def mean_native_ms(self) -> float:
        return float(np.median(self.native_ms, axis=0).mean())


def measure_runs(runs: Sequence[Run], console: Console) -> list[Measured]:
    """Times every model on every image, in turns."""
    images = torch.cat([x for x, _ in task().testing])[:: 10_000 // IMAGES][:IMAGES]
    x = task().example_inputs(1)
    fast = {run: _repacked(run.model, x) for run in runs}
    open_ = {run: _repacked(let_pass(run.model), x) if gates(run.model) else fast[run] for run in runs}
    times, natively = ({run: np.zeros((ROUNDS, len(images))) for run in runs} for _ in range(2))
    with torch.inference_mode(), console.bar("timing", ROUNDS) as bar:
        for number in range(ROUNDS):
            for image in range(len(images)):
                given = images[image : image + 1]
                for run in runs if (number + image) % 2 else runs[::-1]:
                    fast[run](given)
                    start = time.perf_counter()
                    fast[run](given)
                    times[run][number, image] = 1e3 * (time.perf_counter() - start)
                    natively[run][number, image] = _native_ms(fast[run], given)
            bar.advance(1)
    passing = measure_together({str(run.variant): partial(open_[run], *x) for run in runs}, Protocol(threads=1))
    return [
        Measured(
            run, times[run], natively[run], _live(run.model, images), passing[str(run.variant)].median_ms,
            profiled(fast[run], run.model, images, float(np.median(times[run]))),
        )
        for run in runs
    ]  # fmt: skip


def _native_ms(fast: ProgramModel, given: Tensor) -> float:
    plan = fast.program.plan((tuple(given.shape),))
    frame = plan.frame()
    plan.fill(frame, (given,))
    (part,) = plan.parts  # one native call: nothing of this model is left to torch
    assert isinstance(part, NativeSequence)
    start = time.perf_counter()
    part.run(frame.slots.ctypes.data, frame.counters[0].ctypes.data)
    taken = 1e3 * (time.perf_counter() - start)
    plan.release(frame)
    return taken


def let_pass(model: nn.Module) -> nn.Module:
    """A copy whose gates silence nothing."""
    opened = copy.deepcopy(model)
    for gate in gates(opened).values():
        gate.gating = Gating(gate.gating.group_size, 1.0)
        with torch.no_grad():
            gate.threshold.zero_()
            gate.bias.add_(10.0)
    return opened


def profiled(fast: ProgramModel, model: nn.Module, images: Tensor, whole_ms: float) -> dict[str, float]:
    """Microseconds an image, by what they are spent on; a timed operation's own call is taken out.

    The rest is pooling and the classifier; `call` is the Python around the native code.
    """
    call_us = _call_us()
    totals: dict[str, list[float]] = {"predictors": [], "convolutions": [], "copies": [], "rest": []}
    for image in range(0, len(images), len(images) // PROFILED):
        parts = dict.fromkeys(totals, 0.0)
        for row in layer_times(fast, model, images[image : image + 1], Protocol(samples=20)):
            kinds = {"gate": "predictors", "conv2d": "convolutions", "gated_conv2d": "convolutions", COPY: "copies"}
            parts[kinds.get(row.kind, "rest")] += max(0.0, row.median_us - call_us)
        for name, value in parts.items():
            totals[name].append(value)
    found = {name: statistics.fmean(values) for name, values in totals.items()}
    return {**found, "call": 1e3 * whole_ms - sum(found.values())}


def _call_us() -> float:
    """Median microseconds of calling a native operation that has nothing to do."""
    op = NativeOp("nothing", Kernel("nothing", host(), ir.Module), np.zeros(1, np.int64), 0)
    nothing, times = NativeSequence([op]), []
    for _ in range(500):
        start = time.perf_counter()
        nothing.run_op(0, 0)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def mechanism(console: Console) -> dict[tuple[str, float, float | None], float]:
    """Median milliseconds by widths, static sparsity and live share (None: no gates), of untrained models."""
    found: dict[tuple[str, float, float | None], float] = {}
    with console.bar("live shares", len(WIDTHS)) as bar:
        for widths in WIDTHS:
            given = TASKS.create(Choice("fashion_mnist", {"widths": widths}))
            x, calls = given.example_inputs(1), {}
            for sparsity in SPARSITIES:
                for share in (None, *SHARES):
                    model = copy.deepcopy(given.model).eval()
                    if share is not None:
                        gate_channels_(model, x, PLACES["inner"], Gating(4, share))
                    prune_(model, take_inventory(model, x).layers[1:-1], PATTERN, sparsity)
                    fast = _repacked(model.eval(), x)
                    calls[f"{sparsity} {share}"] = partial(fast, *x)
                    found[str(widths), sparsity, share] = 0.0
            times = measure_together(calls, Protocol(threads=1))
            for name, sparsity, share in found:
                if name == str(widths):
                    found[name, sparsity, share] = times[f"{sparsity} {share}"].median_ms
            bar.advance(1)
    return found


def _repacked(model: nn.Module, x: tuple[Tensor, ...]) -> ProgramModel:
    fast = repack(model, x, threads=1, form="program")
    assert isinstance(fast, ProgramModel)
    return fast


def _live(model: nn.Module, images: Tensor) -> float:
    shares = live_shares(model, images)
    return float(torch.stack(list(shares.values())).mean()) if shares else 1.0
