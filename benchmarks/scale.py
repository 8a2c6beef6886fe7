"""Trials a minute against workers on this machine, and a model of more: ``python -m benchmarks scale``.

The trials of a search on digits: masks, recovery, repacking, score, and the timing that nobody works beside. Dense
training is cached; a few minutes on two cores. Writes benchmarks/results/scale.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch

from autoprune.evaluation.dense import dense_model
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.pool import ProcessPool, cores
from autoprune.evaluation.recovery import RECOVERIES, Subject
from autoprune.latency.timer import Protocol
from autoprune.masks import collect_statistics
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT
from autoprune.registry import Choice
from autoprune.report.table import markdown_table
from autoprune.tasks import TASKS
from autoprune.testing import fake_table
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

TASK = Choice("digits", {"widths": [16, 32, 64]})
PATTERN, CRITERION = Choice("group", {"size": 8}), Choice("magnitude")
TRIALS = {Choice("batch_norm"): 16, Choice("train", {"steps": 10}): 8}  # recovery -> trials a measurement
WORKERS = (1, 2, 4)
MODELLED = (4, 8, 16, 32, 64)
SAMPLES = 25  # rounds of a timing, as a search has by default


@dataclass(frozen=True)
class Parts:
    """Seconds of one trial in one process: what is done beside others, repacking (a part of it), and the timing."""

    scored_s: float
    repacked_s: float
    timed_s: float

    def a_minute(self, workers: int) -> float:
        """On one machine: nobody scores while somebody times."""
        return 60 / (self.scored_s / workers + self.timed_s)

    def a_minute_clustered(self, workers: int) -> float:
        """With one device apart from the workers, which repacks once more and times: the slower side decides."""
        return 60 / max(self.scored_s / workers, self.repacked_s + self.timed_s)


def evaluator_of(recovery: Choice) -> Evaluator:
    task = TASKS.create(TASK)
    settings = replace(task.dense_training, epochs=2) if task.dense_training else None
    dense = dense_model(task, TASK, settings, 0, SILENT)
    inventory = take_inventory(dense, task.example_inputs(1))
    statistics = collect_statistics(dense, inventory.names, task.calibration, task.loss, frozenset())
    assert settings is not None
    subject = Subject(task, dense, inventory, statistics, settings, seed=0)
    table = fake_table(inventory, (PATTERN,))  # a program asks no table
    return Evaluator(subject, table, RECOVERIES.create(recovery), Protocol(samples=SAMPLES))


def random_plans(names: Sequence[str], count: int) -> list[Plan]:
    draws = np.random.default_rng(0)
    return [
        Plan(
            {name: LayerPlan(float(draws.uniform(0.2, 0.9)), PATTERN, CRITERION) for name in names}, Choice("one_shot")
        )
        for _ in range(count)
    ]


def parts(evaluator: Evaluator, plans: Sequence[Plan]) -> Parts:
    """Means over the plans; kernels are tuned already, as they are in all but a search's first trials."""
    found = []
    for plan in plans:
        times = [time.perf_counter()]
        model = evaluator.masked_model(plan)
        times.append(time.perf_counter())
        fast = evaluator.repacked(model, plan)
        times.append(time.perf_counter())
        evaluator.score(fast)
        times.append(time.perf_counter())
        evaluator.time(fast)
        times.append(time.perf_counter())
        found.append(np.diff(times))
    recovered, repacked, scored, timed = (fmean(column) for column in zip(*found, strict=True))
    return Parts(recovered + repacked + scored, repacked, timed)


def a_minute(evaluator: Evaluator, plans: Sequence[Plan], workers: int) -> float:
    """Trials a minute, once the workers have started and have seen a plan each."""
    with ProcessPool(evaluator, workers) as pool:
        pool.all(plans[:workers])
        start = time.perf_counter()
        pool.all(plans)
        return 60 * len(plans) / (time.perf_counter() - start)


def measure(recovery: Choice, count: int) -> tuple[Parts, dict[int, float]]:
    evaluator = evaluator_of(recovery)
    plans = random_plans(evaluator.subject.inventory.names, count)
    evaluator.all(plans)  # tunes the kernels
    # Half before and half after, for what the machine does meanwhile.
    before = parts(evaluator, plans[::2])
    rates = {}
    for workers in WORKERS:
        rates[workers] = a_minute(evaluator, plans, workers)
        print(f"{recovery}, {workers} workers: {rates[workers]:.1f} trials a minute", flush=True)
    after = parts(evaluator, plans[1::2])
    pairs = zip(vars(before).values(), vars(after).values(), strict=True)
    return Parts(*(fmean(pair) for pair in pairs)), rates


def rows_of(found: Mapping[Choice, tuple[Parts, Mapping[int, float]]]) -> list[list[str]]:
    rows = []
    for recovery, (part, rates) in found.items():
        for workers, rate in rates.items():
            modelled = part.a_minute(min(workers, cores()))
            gain = rate / rates[1]
            rows.append([str(recovery), str(workers), f"{rate:.1f}", f"{gain:.2f}x", f"{modelled:.1f}"])
    return rows


def modelled_rows(found: Mapping[Choice, tuple[Parts, Mapping[int, float]]]) -> list[list[str]]:
    rows = []
    for recovery, (part, _) in found.items():
        for title, rate in (("one machine", part.a_minute), ("a cluster, one device", part.a_minute_clustered)):
            rows.append([str(recovery), title, *(f"{rate(workers):.0f}" for workers in (*MODELLED, 10**9))])
    return rows


def main(argv: Sequence[str]) -> int:
    given = command_line("scale", __doc__).parse_args(argv)
    start, load = time.perf_counter(), os.getloadavg()[0]
    torch.set_num_threads(1)
    found = {recovery: measure(recovery, count) for recovery, count in TRIALS.items()}
    counts = ", ".join(f"{count} with `{recovery}`" for recovery, count in TRIALS.items())
    taken = [
        [str(recovery), f"{part.scored_s:.3f}", f"{part.repacked_s:.3f}", f"{part.timed_s:.3f}",
         f"{part.timed_s / (part.scored_s + part.timed_s):.0%}"]
        for recovery, (part, _) in found.items()
    ]  # fmt: skip
    text = page(
        "Trials against workers",
        "scale",
        f"Trials of a search on `{TASK}`, batch 1, one thread each; so many a "
        f"measurement: {counts}. {cores()} cores; load average when it began: {load:.1f}.",
        str(Provenance.here()),
        "## What a trial takes in one process",
        markdown_table(("recovery", "scored, s", "of it repacking, s", "timed, s", "share that is serial"), taken),
        "## Measured",
        "Modelled: 60 / (scored / workers + timed), with as many workers as there are cores at most: nobody scores "
        "while somebody times. Not in it: plans take unlike times to score, and a timing waits for the slowest.",
        markdown_table(("recovery", "workers", "trials a minute", "against 1", "modelled"), rows_of(found)),
        "## Modelled beyond",
        "Trials a minute, not measured. One machine of so many cores, by the same model; its memory is not in it. A "
        "cluster, with one node that has the target device and scores nothing: the slower of scored / workers and of "
        "repacking and timing there. What sending takes is not in it.",
        markdown_table(
            ("recovery", "where", *(f"{workers} workers" for workers in MODELLED), "limit"), modelled_rows(found)
        ),
    )
    write_page(given.output, "scale", text)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0
